# SPDX-License-Identifier: Apache-2.0
"""The consumer's side in a worker: blocks are fetched in the background."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from functools import partial

import msgspec
import torch

from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.keys import BlocksCacheKey
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for
from llm_datadist_torch.vllm import mapping
from llm_datadist_torch.vllm.fingerprint import Fingerprint
from llm_datadist_torch.vllm.layouts import KVLayout
from llm_datadist_torch.vllm.observing import Record
from llm_datadist_torch.vllm.params import NULL_BLOCK, Peer, RemoteBlocks
from llm_datadist_torch.vllm.protocol import (
    Checksums,
    Claim,
    Description,
    Release,
    Sums,
    Verdict,
)
from llm_datadist_torch.vllm.settings import Settings
from llm_datadist_torch.vllm.steps import Pull, Step
from llm_datadist_torch.vllm.worker.leases import Leases
from llm_datadist_torch.vllm.worker.service import TimeLimit, WorkerService, until_known

logger = logging.getLogger("llm_datadist_torch")

# Rows whose checksums are asked for at a time: a question has at most 1 MiB.
_ROWS_PER_QUESTION = 32_768
_RETRY_S = 0.002


@dataclass
class Done:
    """What the engine is to hear.

    Attributes:
        sent: Requests whose blocks need not be kept any more.
        received: Requests whose blocks have been fetched or could not be.
        failed: Those of them that could not be, with the blocks that are missing.
    """

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: dict[str, set[int]] = field(default_factory=dict)

    @classmethod
    def without_caches(cls, step: Step) -> Done:
        """What becomes of a step where there are no caches: nothing is kept, and loads fail."""
        blocks = {pull.request_id: pull.local_blocks for pull in step.pulls if pull.awaited}
        blocks |= {each.request_id: each.blocks for each in step.expects if each.blocks}
        return cls(
            sent={grant.request_id for grant in step.grants}
            | {end.request_id for end in step.push_ends if end.kept},
            received=set(blocks),
            failed={
                request_id: {block for group in groups for block in group if block != NULL_BLOCK}
                for request_id, groups in blocks.items()
            },
        )

    def add(self, other: Done) -> None:
        """All that is in another one, too."""
        self.sent |= other.sent
        self.received |= other.received
        self.failed.update(other.failed)


@dataclass(eq=False)
class _Load:
    """A pull, until all of its sources have ended."""

    pull: Pull
    limit: TimeLimit
    left: int
    began: float = field(default_factory=time.monotonic)
    moved: set[tuple[str, int]] = field(default_factory=set)
    num_bytes: int = 0
    error: Exception | None = None


class Puller:
    """Fetches blocks of other engines into this worker's.

    A pull is one job for each worker that it reads from, in that worker's lane: link where there is
    no link yet, compare what both ends have, claim the lease, pull, compare checksums if that is
    wanted, release. Only a release that finds the lease still there makes it a success. The engine
    hears of the end when all of a pull's jobs have ended, so that nothing is written any more.

    Thread safety: all methods may be called from any thread, and don't block.

    Args:
        service: This worker's instance.
        settings: The connector's settings.
        fingerprint: What peers must have in common with it.
        layout: Its KV.
        leases: What this worker keeps: parameters may lead back to it.
        record: What is counted.
    """

    def __init__(
        self,
        service: WorkerService,
        settings: Settings,
        fingerprint: Fingerprint,
        layout: KVLayout,
        leases: Leases,
        record: Record,
    ) -> None:
        self._service = service
        self._settings = settings
        self._fingerprint = fingerprint
        self._layout = layout
        self._leases = leases
        self._record = record
        self._lock = threading.Lock()
        self._done = Done()
        self._loads: set[_Load] = set()

    def start(self, pull: Pull) -> None:
        """Fetch, in the background."""
        load = _Load(pull, TimeLimit(self._settings.timeout_s), left=1)
        with self._lock:
            self._loads.add(load)
        try:
            workers = self.sources(pull.remote)
        except LLMException as error:
            self._end(load, error)
            return
        load.left = len(workers)
        for worker in workers:
            peer = pull.remote.remote_peers[worker]
            self._service.lanes.submit(
                ("pull", peer.cluster_id),
                partial(self._run, load, worker),
                within_s=load.limit.left_s,
                expired=partial(self._end, load, _no_turn(peer)),
            )

    def sources(self, remote: RemoteBlocks) -> list[int]:
        """Indices of the workers to read from.

        Raises:
            LLMParamError: As for :func:`~..mapping.sources`.
        """
        size = remote.remote_tp_size
        return mapping.sources(self._layout, size, len(remote.remote_peers) // size)

    def readers(self, remote: RemoteBlocks, worker: int) -> int:
        """How many workers of this engine read from that one."""
        size = remote.remote_tp_size
        return mapping.readers(self._layout, size, worker, len(remote.remote_peers) // size)

    def take_done(self) -> Done:
        """What has ended since the last call."""
        with self._lock:
            done, self._done = self._done, Done()
        return done

    def end_all(self) -> None:
        """No job runs, and none will: what was not loaded is not."""
        for load in list(self._loads):
            load.left = 1
            self._end(load, error_for(LLMStatusCode.LLM_FAILED, "the worker has been closed"))

    # -- the jobs ---------------------------------------------------------------------------------

    def _run(self, load: _Load, worker: int) -> None:
        error: Exception | None = None
        try:
            if load.pull.local_blocks:
                self._fetch(load, worker)
            else:
                self._only_release(load, worker)
        except Exception as raised:  # noqa: BLE001  it is told to the engine, which waits
            error = raised
        self._end(load, error)

    def _end(self, load: _Load, error: Exception | None) -> None:
        """One of its sources has ended."""
        with self._lock:
            load.error = load.error or error
            load.left -= 1
            if load.left:
                return
            self._loads.discard(load)
        pull = load.pull
        if load.error is None and pull.local_blocks:
            missing = mapping.all_layers(self._layout) - load.moved
            if missing:
                load.error = param_error(f"nobody there has layer {min(missing)[0]!r}")
        if load.error is not None:
            told = isinstance(load.error, LLMException)
            logger.warning(
                "the KV of request %s was not fetched from engine %s: %s",
                pull.request_id,
                pull.remote.remote_engine_id,
                load.error,
                exc_info=None if told else load.error,
            )
        if not pull.awaited:
            return
        if load.error is None:
            self._record.loaded(time.monotonic() - load.began, load.num_bytes)
        else:
            self._record.failed(load.error)
        with self._lock:
            self._done.received.add(pull.request_id)
            if load.error is not None:
                self._done.failed[pull.request_id] = self._missing(pull)

    def _missing(self, pull: Pull) -> set[int]:
        """The blocks that were to be filled. A null block is nobody's."""
        return {
            block
            for group, blocks in zip(self._layout.groups, pull.local_blocks, strict=True)
            for block in blocks[pull.first_token // group.block_size if group.block_size else 0 :]
            if block != NULL_BLOCK
        }

    def _fetch(self, load: _Load, worker: int) -> None:
        remote = load.pull.remote
        peer = remote.remote_peers[worker]
        if peer.life == self._service.life:
            self._copy(load)
            return
        told = self._service.meet(peer, load.limit)
        numbers, count = (remote.remote_lease,), self.readers(remote, worker)
        # Not waited for: it comes before the release, whose answer says whether the lease was there
        # all the time.
        self._service.send(peer.cluster_id, Claim(peer.life, numbers, count))
        try:
            self._check_fits(peer, told)
            self._fetch_from(peer, told.layout, load)
        except BaseException:
            self._service.send(peer.cluster_id, Release(peer.life, remote.remote_lease, count))
            raise
        self._check_held(remote, self._release(peer, remote, count, load.limit))

    def _only_release(self, load: _Load, worker: int) -> None:
        """Nothing is to be fetched; the producer need not keep it."""
        remote = load.pull.remote
        peer, count = remote.remote_peers[worker], self.readers(remote, worker)
        if peer.life == self._service.life:
            self._leases.release(remote.remote_lease, peer.cluster_id, count)
            return
        self._service.meet(peer, load.limit)
        self._release(peer, remote, count, load.limit)

    def _release(
        self, peer: Peer, remote: RemoteBlocks, count: int, limit: TimeLimit
    ) -> bool | None:
        question = Release(peer.life, remote.remote_lease, count)

        def query() -> bool | None:
            answer = self._service.request(peer.cluster_id, question, limit)
            return msgspec.msgpack.decode(answer, type=Verdict).held

        return until_known(query, limit, _RETRY_S)

    @staticmethod
    def _check_held(remote: RemoteBlocks, held: bool | None) -> None:
        if not held:
            raise error_for(
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
                f"engine {remote.remote_engine_id} has given up the blocks of request"
                f" {remote.remote_request_id}",
                remedy="raise claim_s at the producer if consumers come later than that, and"
                " lease_s if they take longer.",
            )

    def _check_fits(self, peer: Peer, told: Description) -> None:
        reasons = self._fingerprint.differences(told.fingerprint)
        refused = mapping.refusal(self._layout, told.layout)
        if refused:
            reasons.append(refused)
        if reasons:
            raise param_error(f"{peer} has other KV: {'; '.join(reasons)}")

    # -- bytes ------------------------------------------------------------------------------------

    def _moves(self, layout: KVLayout, load: _Load) -> list[mapping.Move]:
        pull = load.pull
        found = mapping.moves(
            self._layout,
            layout,
            pull.local_blocks,
            pull.remote.remote_block_ids,
            mapping.Tokens(pull.first_token, pull.num_tokens),
        )
        with self._lock:
            load.moved |= mapping.layers_moved(self._layout, layout)
            load.num_bytes += sum(
                len(move.dst_rows)
                * len(move.dst_layers)
                * self._layout.caches[move.dst_cache].unit_bytes
                for move in found
            )
        return found

    def _fetch_from(self, peer: Peer, layout: KVLayout, load: _Load) -> None:
        for move in self._moves(layout, load):
            self.fetch_rows(peer.cluster_id, move, load.limit)
            if self._settings.verify:
                self._verify(peer, load.pull.remote.remote_lease, move, load.limit)

    def fetch_rows(self, peer: int, move: mapping.Move, limit: TimeLimit) -> None:
        """Rows of one blocks cache of a peer into rows of ours. Blocks.

        Raises:
            LLMException: They did not arrive.
        """
        self._service.datadist.cache_manager.pull_blocks(
            BlocksCacheKey(peer, move.src_cache),
            self._service.caches[move.dst_cache],
            move.src_rows,
            move.dst_rows,
            src_layer_range=move.src_layers,
            dst_layer_range=move.dst_layers,
            tensor_num_per_layer=1,
            timeout=limit.left_ms,
        )

    def _copy(self, load: _Load) -> None:
        """The blocks are this worker's own: nobody else is asked."""
        remote = load.pull.remote
        me = self._service.datadist.cluster_id
        self._leases.claim([remote.remote_lease], me, 1)
        for move in self._moves(self._layout, load):
            pairs = torch.stack((move.src_rows, move.dst_rows), 1)
            self._service.datadist.cache_manager.copy_blocks(
                self._service.caches[move.dst_cache], pairs
            )

        def release() -> bool | None:
            return self._leases.release(remote.remote_lease, me, 1)

        self._check_held(remote, until_known(release, load.limit, _RETRY_S))

    def _verify(self, peer: Peer, lease: int, move: mapping.Move, limit: TimeLimit) -> None:
        mine = self._service.checksums(move.dst_cache, move.dst_rows, move.dst_layers)
        theirs: list[int] = []
        for start in range(0, len(move.src_rows), _ROWS_PER_QUESTION):
            part = move.src_rows[start : start + _ROWS_PER_QUESTION]
            question = Checksums(
                peer.life,
                lease,
                move.src_cache,
                (move.src_layers.start, move.src_layers.stop),
                part.numpy().tobytes(),
            )
            while (sums := self._sums(peer, question, limit)) is None:
                time.sleep(_RETRY_S)
            theirs += sums
        if mine != theirs:
            wrong = sum(a != b for a, b in zip(mine, theirs, strict=True))
            raise error_for(
                LLMStatusCode.LLM_FAILED,
                f"{wrong} of {len(mine)} pieces differ in their checksums from {peer}'s",
                peer=peer.cluster_id,
            )

    def _sums(self, peer: Peer, question: Checksums, limit: TimeLimit) -> list[int] | None:
        answer = self._service.request(peer.cluster_id, question, limit)
        return msgspec.msgpack.decode(answer, type=Sums).sums


def _no_turn(peer: Peer) -> LLMException:
    return error_for(
        LLMStatusCode.LLM_TIMEOUT,
        f"other transfers with {peer} have taken all of the time",
        peer=peer.cluster_id,
        remedy="raise timeout_s, or threads.",
    )
