# SPDX-License-Identifier: Apache-2.0
"""The consumer's side in a worker with "push": blocks that producers write."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from llm_datadist_torch.cache import Cache
from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.values.status import LLMTimeoutError
from llm_datadist_torch.vllm.protocol import Place, Pushed
from llm_datadist_torch.vllm.service import WorkerService
from llm_datadist_torch.vllm.settings import Settings
from llm_datadist_torch.vllm.steps import Expect
from llm_datadist_torch.work import Work
from llm_datadist_torch.workers import WorkerPool

logger = logging.getLogger("llm_datadist_torch")

# Above all names of the engine's own caches.
_FIRST_NAME = 1 << 32
MAX_REFUSED = 4096
"""Transfers that producers have given up, and the engine has not asked for."""


@dataclass
class _Expected:
    """A transfer that is expected, from the engine's step until the engine has heard of its end."""

    expect: Expect
    ends_at: float
    caches: list[Cache] = field(default_factory=list)
    place: Place | None = None
    peer: int | None = None
    ending: bool = False


class Receiver:
    """Blocks that producers write into.

    A producer must not write any more when the engine gives blocks to others. So each transfer has
    names of its own for the engine's tensors: unregistering them waits for a write that is under
    way, and later ones find nothing. Only then the engine hears of the end, good or bad.

    Thread safety: all methods may be called from any thread, and don't block; ``close`` does.

    Args:
        service: This worker's instance.
        settings: The connector's settings. ``lease_s`` is how long a transfer is waited for.
        groups: The tensors of whole pages.
        block_size: Tokens of a block.
        digest: What producers must have, too.
    """

    def __init__(
        self,
        service: WorkerService,
        settings: Settings,
        groups: Sequence[Sequence[torch.Tensor]],
        block_size: int,
        digest: str,
    ) -> None:
        self._service = service
        self._settings = settings
        self._groups = groups
        self._block_size = block_size
        self._digest = digest
        self._names = itertools.count(_FIRST_NAME)
        self._lock = threading.Lock()
        self._expected: dict[str, _Expected] = {}
        self._unwanted: dict[str, float] = {}
        self._refused: dict[str, float] = {}
        self._done: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._workers = WorkerPool("vllm-receive", settings.threads, keep=settings.threads)
        self._closed = threading.Event()

    def expect(self, expect: Expect) -> None:
        """The engine wants these blocks, or (without blocks) wants them no more."""
        ends_at = time.monotonic() + self._settings.lease_s
        with self._lock:
            if not expect.blocks:
                self._unwanted[expect.transfer_id] = ends_at
                given_up = self._expected.get(expect.transfer_id)
                if given_up is not None and not given_up.ending:
                    self._end(given_up, complete=False)
                return
            if expect.transfer_id in self._expected:
                logger.warning("transfer %s is expected already", expect.transfer_id)
                self._finish(expect, complete=False)
                return
            if self._refused.pop(expect.transfer_id, None) is not None:
                self._finish(expect, complete=False)
                return
            expected = self._expected[expect.transfer_id] = _Expected(expect, ends_at)
        self._workers.submit(Work(partial(self._open, expected), 1))

    def where(self, peer: int, transfer_id: str) -> Place:
        """Where a producer may write."""
        with self._lock:
            expected = self._expected.get(transfer_id)
            if expected is None:
                return Place(known=transfer_id in self._unwanted, wanted=False)
            if expected.ending:
                return Place(known=True, wanted=False)
            if expected.place is None:
                return Place(known=False)
            expected.peer = peer
            return expected.place

    def pushed(self, peer: int, pushed: Pushed) -> bool:
        """A producer has written, or will not; whether that was expected of it."""
        with self._lock:
            expected = self._expected.get(pushed.transfer_id)
            if expected is None and not pushed.complete and len(self._refused) < MAX_REFUSED:
                # The engine may still ask for it.
                self._refused[pushed.transfer_id] = time.monotonic() + self._settings.lease_s
            if expected is None or expected.ending or expected.peer not in (peer, None):
                return False
            complete = pushed.complete and expected.peer == peer
            self._end(expected, complete=complete, sums=pushed.sums)
            return True

    def peer_gone(self, peer: int) -> None:
        """The link to a peer is lost: what it was writing is not complete."""
        with self._lock:
            for expected in list(self._expected.values()):
                if expected.peer == peer and not expected.ending:
                    self._end(expected, complete=False)

    def take_done(self) -> tuple[set[str], set[int]]:
        """Requests that are done since the last call, and local blocks that were not written."""
        with self._lock:
            now = time.monotonic()
            for expected in list(self._expected.values()):
                if expected.ends_at < now and not expected.ending:
                    logger.warning("transfer %s did not come", expected.expect.transfer_id)
                    self._end(expected, complete=False)
            for heard in (self._unwanted, self._refused):
                for transfer_id in [each for each, end in heard.items() if end < now]:
                    del heard[transfer_id]
            done, self._done = self._done, set()
            failed, self._failed_blocks = self._failed_blocks, set()
        return done, failed

    def close(self) -> None:
        """Wait for nothing any more."""
        self._closed.set()
        self._workers.close(Deadline.after_ms(self._settings.timeout_ms))

    # -- jobs -------------------------------------------------------------------------------------

    def _open(self, expected: _Expected, work: Work) -> None:
        expect = expected.expect
        with work.step(0):
            names = [next(self._names) for _ in self._groups]
            caches = [
                self._service.register(name, group)
                for name, group in zip(names, self._groups, strict=True)
            ]
        with self._lock:
            expected.caches = caches
            expected.place = Place(
                known=True,
                model_ids=tuple(names),
                blocks=expect.blocks,
                first_token=expect.first_token,
                num_tokens=expect.num_tokens,
                prompt=expect.prompt,
                digest=self._digest,
                verify=self._settings.verify,
            )
        work.succeed(0)

    def _end(
        self, expected: _Expected, *, complete: bool, sums: Sequence[Sequence[int]] = ()
    ) -> None:
        """With the lock held: nobody may write from now on; tell the engine when nobody does."""
        expected.ending = True
        self._workers.submit(Work(partial(self._shut, expected, complete, sums), 1))

    def _shut(
        self, expected: _Expected, complete: bool, sums: Sequence[Sequence[int]], work: Work
    ) -> None:
        with work.step(0):
            for cache in expected.caches:
                while not self._unregistered(cache):
                    if self._closed.is_set():
                        return
            # Only now nobody writes any more, so this is what the engine will use.
            if complete and self._settings.verify:
                complete = self._as_sent(expected.expect, sums)
        with self._lock:
            del self._expected[expected.expect.transfer_id]
            self._finish(expected.expect, complete=complete)
        work.succeed(0)

    def _unregistered(self, cache: Cache) -> bool:
        try:
            self._service.datadist.cache_manager.unregister_cache(cache.cache_id)
        except LLMTimeoutError:
            # A producer that hangs in a write: the blocks can't be given to anybody else yet.
            return False
        return True

    def _as_sent(self, expect: Expect, sums: Sequence[Sequence[int]]) -> bool:
        """Whether the blocks have the checksums that the producer says."""
        last = -(-expect.num_tokens // self._block_size)
        rows = torch.tensor(expect.blocks[expect.first_token // self._block_size : last])
        mine = [self._service.checksums(group, rows) for group in range(len(self._groups))]
        if mine == [list(each) for each in sums]:
            return True
        logger.warning(
            "blocks of transfer %s differ in their checksums from the producer's",
            expect.transfer_id,
        )
        return False

    def _finish(self, expect: Expect, *, complete: bool) -> None:
        self._done.add(expect.request_id)
        if not complete:
            logger.warning("the KV of request %s was not pushed", expect.request_id)
            self._failed_blocks |= set(expect.blocks[expect.first_token // self._block_size :])
