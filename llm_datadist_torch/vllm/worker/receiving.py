# SPDX-License-Identifier: Apache-2.0
"""The consumer's side in a worker with "push": blocks that producers write."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import torch

from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, LLMTimeoutError, error_for
from llm_datadist_torch.vllm.layouts import KVLayout
from llm_datadist_torch.vllm.observing import Record
from llm_datadist_torch.vllm.params import NULL_BLOCK
from llm_datadist_torch.vllm.protocol import (
    NUMBERS_PER_MESSAGE,
    Place,
    Process,
    Pushed,
    PushedSums,
    Stop,
    Verdict,
    Where,
    packed,
    unpacked,
)
from llm_datadist_torch.vllm.settings import Settings
from llm_datadist_torch.vllm.steps import Expect
from llm_datadist_torch.vllm.worker.processes import has_ended, this_process
from llm_datadist_torch.vllm.worker.pulling import Done
from llm_datadist_torch.vllm.worker.service import TimeLimit, WorkerService

logger = logging.getLogger("llm_datadist_torch")

MAX_REFUSED = 4096
"""Transfers that producers have given up, and the engine has not asked for."""
# Names of transfers are above all names of the engine's own caches, and differ in each life: a
# producer that is late must not write into what has its name in the next one.
_NAME_BITS = 62
_UNREGISTER_MS = 1
_FIRST_RETRY_S, _LAST_RETRY_S = 0.01, 1.0


@dataclass
class _Expected:
    """A transfer that is expected, from the engine's step until the engine has heard of its end.

    Attributes:
        expect: What the engine wants.
        ends_at: When it is given up.
        caches: The engine's tensors, under names of this transfer.
        model_ids: Those names; None while they are being made.
        writer: Who has been told where to write, and its process. Until it has said that it
            stopped, or its process has ended, the blocks are nobody else's.
        writing: Whether it may still write.
        sums: Its checksums, by cache and row.
        ending: Nobody else is told where to write.
        complete: Whether all has been written.
    """

    expect: Expect
    ends_at: float
    caches: list[Cache] = field(default_factory=list)
    model_ids: tuple[int, ...] | None = None
    writer: Where | None = None
    writing: bool = False
    sums: dict[tuple[int, int], int] = field(default_factory=dict)
    ending: bool = False
    complete: bool = False


class Receiver:
    """Blocks that producers write into.

    A producer must not write any more when the engine gives blocks to others. So each transfer has
    names of its own for the engine's tensors: unregistering them waits for a write that is under
    way, and later ones find nothing. And a producer that was told where to write says when it has
    stopped; one that has gone silent is asked until it does, or its process has ended. Only then
    the engine hears of the end, good or bad.

    Thread safety: all methods may be called from any thread, and don't block.

    Args:
        service: This worker's instance.
        settings: The connector's settings. ``lease_s`` is how long a transfer is waited for.
        layout: This worker's KV.
        pages: The tensors of whole pages, per part.
        digest: What producers must have, too.
        record: What is counted.
        ended: Whether a process has ended, as far as that can be known.
    """

    def __init__(
        self,
        service: WorkerService,
        settings: Settings,
        layout: KVLayout,
        pages: Sequence[Sequence[torch.Tensor]],
        digest: str,
        record: Record,
        ended: Callable[[Process], bool] | None = None,
    ) -> None:
        self._service = service
        self._settings = settings
        self._layout = layout
        self._pages = pages
        self._digest = digest
        self._record = record
        me = this_process()
        self._ended = ended or (lambda process: has_ended(process, me))
        self._names = itertools.count(secrets.randbits(_NAME_BITS) | 1 << _NAME_BITS)
        self._lock = threading.Lock()
        self._expected: dict[str, _Expected] = {}
        self._unwanted: dict[str, float] = {}
        self._refused: dict[str, float] = {}
        self._done = Done()

    def expect(self, expect: Expect) -> None:
        """The engine wants these blocks, or (without blocks) wants them no more."""
        ends_at = time.monotonic() + self._settings.lease_s
        with self._lock:
            if not expect.blocks:
                self._unwanted[expect.transfer_id] = ends_at
                given_up = self._expected.get(expect.transfer_id)
                if given_up is not None and not given_up.ending:
                    self._end(given_up)
                return
            if expect.transfer_id in self._expected:
                logger.warning("transfer %s is expected already", expect.transfer_id)
                self._finish(expect, complete=False)
                return
            if self._refused.pop(expect.transfer_id, None) is not None:
                self._finish(expect, complete=False)
                return
            expected = self._expected[expect.transfer_id] = _Expected(expect, ends_at)
        self._submit(expected, self._open)

    # -- for peers --------------------------------------------------------------------------------

    def where(self, question: Where) -> Place:
        """Where a producer may write."""
        with self._lock:
            expected = self._expected.get(question.transfer_id)
            if expected is None:
                return Place(known=question.transfer_id in self._unwanted, wanted=False)
            if expected.ending:
                return Place(known=True, wanted=False)
            if expected.model_ids is None:
                return Place(known=False)
            writer = expected.writer
            if writer is not None and writer.writer.life != question.writer.life:
                return Place(known=True, wanted=False)
            expected.writer, expected.writing = question, True
            return self._place(expected, question.offset)

    def _place(self, expected: _Expected, offset: int) -> Place:
        expect = expected.expect
        numbers = list(itertools.chain.from_iterable(expect.blocks))
        return Place(
            known=True,
            life=self._service.life,
            model_ids=expected.model_ids or (),
            counts=tuple(len(blocks) for blocks in expect.blocks),
            blocks=packed(numbers[offset : offset + NUMBERS_PER_MESSAGE]),
            first_token=expect.first_token,
            num_tokens=expect.num_tokens,
            prompt=expect.prompt,
            digest=self._digest,
            verify=self._settings.verify,
        )

    def sums(self, pushed: PushedSums) -> bool:
        """A producer says what it has written."""
        rows, sums = unpacked(pushed.rows), unpacked(pushed.sums, "I")
        with self._lock:
            expected = self._expected.get(pushed.transfer_id)
            if expected is None or expected.ending or pushed.life != self._service.life:
                return False
            expected.sums.update(
                ((pushed.cache, row), each) for row, each in zip(rows, sums, strict=False)
            )
            return True

    def pushed(self, pushed: Pushed) -> bool:
        """A producer has stopped; whether that was expected of it."""
        if pushed.life not in ("", self._service.life):
            return False
        with self._lock:
            expected = self._expected.get(pushed.transfer_id)
            if expected is None:
                if not pushed.complete and len(self._refused) < MAX_REFUSED:
                    # The engine may still ask for it.
                    ends_at = time.monotonic() + self._settings.lease_s
                    self._refused[pushed.transfer_id] = ends_at
                return False
            if expected.writer is not None and expected.writer.writer.life != pushed.writer:
                return False
            was_writer, expected.writing = expected.writer is not None, False
            if expected.ending:
                return False
            self._end(expected, complete=pushed.complete and was_writer)
            return True

    def peer_gone(self, peer: int) -> None:
        """The link to a peer is lost: what it was writing is not complete."""
        with self._lock:
            for expected in list(self._expected.values()):
                writer = expected.writer
                if writer is not None and writer.writer.cluster_id == peer and not expected.ending:
                    self._end(expected)

    # -- for the engine ---------------------------------------------------------------------------

    def end_all(self) -> None:
        """The instance has ended, and with it all that producers could write to."""
        with self._lock:
            for expected in self._expected.values():
                self._finish(expected.expect, complete=False)
            self._expected.clear()

    def take_done(self) -> Done:
        """What has ended since the last call."""
        with self._lock:
            now = time.monotonic()
            for expected in list(self._expected.values()):
                if expected.ends_at < now and not expected.ending:
                    logger.warning("transfer %s did not come", expected.expect.transfer_id)
                    self._end(expected)
            for heard in (self._unwanted, self._refused):
                for transfer_id in [each for each, end in heard.items() if end < now]:
                    del heard[transfer_id]
            done, self._done = self._done, Done()
        return done

    # -- jobs -------------------------------------------------------------------------------------

    def _submit(self, expected: _Expected, job: Callable[[_Expected], None]) -> None:
        lane = "receive", expected.expect.transfer_id
        self._service.lanes.submit(lane, partial(job, expected))

    def _open(self, expected: _Expected) -> None:
        names = tuple(next(self._names) for _ in self._pages)
        caches: list[Cache] = []
        try:
            for name, tensors in zip(names, self._pages, strict=True):
                caches.append(self._service.register(name, tensors))
        except LLMException as error:
            logger.warning("transfer %s: %s", expected.expect.transfer_id, error)
            with self._lock:
                if not expected.ending:
                    self._end(expected)
        with self._lock:
            expected.caches, expected.model_ids = caches, names

    def _end(self, expected: _Expected, *, complete: bool = False) -> None:
        """With the lock held: nobody else may write; tell the engine when nobody does."""
        expected.ending, expected.complete = True, complete
        self._submit(expected, partial(self._shut, _FIRST_RETRY_S))

    def _shut(self, retry_s: float, expected: _Expected) -> None:
        """See that nobody writes any more; if that takes long, look again later."""
        if not self._is_shut(expected):
            job = partial(self._shut, min(2 * retry_s, _LAST_RETRY_S), expected)
            self._service.lanes.later(retry_s, ("receive", expected.expect.transfer_id), job)
            return
        # Only now nobody writes any more, so this is what the engine will use.
        complete = expected.complete
        if complete and self._settings.verify:
            complete = self._as_sent(expected)
        with self._lock:
            if self._expected.pop(expected.expect.transfer_id, None) is None:
                return
            self._finish(expected.expect, complete=complete)

    def _is_shut(self, expected: _Expected) -> bool:
        if expected.model_ids is None:
            return False
        while expected.caches:
            try:
                self._service.datadist.cache_manager.unregister_cache(
                    expected.caches[-1].cache_id, timeout=_UNREGISTER_MS
                )
            except LLMTimeoutError:
                # A write is under way.
                break
            expected.caches.pop()
        if expected.writing and expected.writer is not None:
            expected.writing = not self._has_stopped(expected.writer)
        return not expected.caches and not expected.writing

    def _has_stopped(self, writer: Where) -> bool:
        """Whether it has stopped writing: it says so, or its process has ended."""
        if self._ended(writer.process):
            return True
        limit = TimeLimit(self._settings.timeout_s)
        try:
            self._service.meet(writer.writer, limit)
            question = Stop(writer.writer.life, writer.transfer_id)
            answer = self._service.request(writer.writer.cluster_id, question, limit)
        except LLMException as error:
            logger.debug("%s has not said that it stopped: %s", writer.writer, error)
            return self._ended(writer.process)
        return msgspec.msgpack.decode(answer, type=Verdict).held is True

    def _as_sent(self, expected: _Expected) -> bool:
        """Whether the blocks have the checksums that the producer says."""
        for (cache, row), sent in expected.sums.items():
            rows = torch.tensor([row])
            layers = range(len(self._pages[cache]))
            if self._service.checksums(cache, rows, layers) != [sent]:
                logger.warning(
                    "blocks of transfer %s differ in their checksums from the producer's",
                    expected.expect.transfer_id,
                )
                return False
        return bool(expected.sums)

    def _finish(self, expect: Expect, *, complete: bool) -> None:
        self._done.received.add(expect.request_id)
        if complete:
            return
        logger.warning("the KV of request %s was not pushed", expect.request_id)
        self._record.failed(
            error_for(LLMStatusCode.LLM_FAILED, f"transfer {expect.transfer_id} is not complete")
        )
        self._done.failed[expect.request_id] = {
            block
            for group, blocks in zip(self._layout.groups, expect.blocks, strict=False)
            for block in blocks[expect.first_token // group.block_size if group.block_size else 0 :]
            if block != NULL_BLOCK
        }
