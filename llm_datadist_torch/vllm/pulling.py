# SPDX-License-Identifier: Apache-2.0
"""The consumer's side in a worker: blocks are fetched in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import msgspec
import torch

from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.keys import BlocksCacheKey
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for
from llm_datadist_torch.vllm import mapping
from llm_datadist_torch.vllm.fingerprint import Fingerprint
from llm_datadist_torch.vllm.layouts import KVLayout
from llm_datadist_torch.vllm.params import Peer, RemoteBlocks
from llm_datadist_torch.vllm.protocol import (
    Asked,
    Checksums,
    Claim,
    Describe,
    Description,
    Release,
    Sums,
    Verdict,
    encode,
)
from llm_datadist_torch.vllm.service import WorkerService
from llm_datadist_torch.vllm.settings import Settings
from llm_datadist_torch.vllm.steps import Pull
from llm_datadist_torch.work import Work
from llm_datadist_torch.workers import WorkerPool

logger = logging.getLogger("llm_datadist_torch")

# Rows whose checksums are asked for at a time: a question has at most 1 MiB.
_ROWS_PER_QUESTION = 32_768
_SUMS_RETRY_S = 0.002
# A release that comes too late does no harm: the lease ends by itself.
_RELEASE_MS = 1000


class Puller:
    """Fetches blocks of other engines into this worker's.

    Each pull runs in a thread of a pool: link where there is no link yet, compare what both ends
    have, claim the lease, pull, compare checksums if that is wanted, release. Only a release that
    finds the lease still there makes it a success.

    Thread safety: all methods may be called from any thread; only the pool's threads block.

    Args:
        service: This worker's instance.
        settings: The connector's settings.
        fingerprint: What peers must have in common with it.
        layout: Its KV.
        digest: Of the last two: a peer with the same digest is not asked what it has.
    """

    def __init__(
        self,
        service: WorkerService,
        settings: Settings,
        fingerprint: Fingerprint,
        layout: KVLayout,
        digest: str,
    ) -> None:
        self._service = service
        self._settings = settings
        self._fingerprint = fingerprint
        self._layout = layout
        self._digest = digest
        self._lock = threading.Lock()
        self._done: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._layouts: dict[int, KVLayout] = {}
        self._workers = WorkerPool("vllm", settings.threads, keep=settings.threads)

    def start(self, pull: Pull) -> None:
        """Fetch, in the background. Does not block."""
        self._workers.submit(Work(lambda work: self._run(pull, work), 1))

    def take_done(self) -> tuple[set[str], set[int]]:
        """Awaited requests that are done since the last call, and local blocks that failed."""
        with self._lock:
            done, self._done = self._done, set()
            failed, self._failed_blocks = self._failed_blocks, set()
        return done, failed

    def close(self) -> None:
        """Start nothing more, and wait for what moves bytes."""
        self._workers.close(Deadline.after_ms(self._settings.timeout_ms))

    # -- the job ----------------------------------------------------------------------------------

    def _run(self, pull: Pull, work: Work) -> None:
        failed: set[int] = set()
        try:
            with work.step(0):
                self._fetch(pull)
        except Exception as error:
            failed = set(pull.local_blocks[pull.first_token // self._layout.block_size :])
            told = error if isinstance(error, LLMException) else None
            logger.warning(
                "the KV of request %s was not fetched from engine %s: %s",
                pull.request_id,
                pull.remote.remote_engine_id,
                error,
                exc_info=None if told else error,
            )
        work.succeed(0)
        if pull.awaited:
            with self._lock:
                self._failed_blocks |= failed
                self._done.add(pull.request_id)

    def _fetch(self, pull: Pull) -> None:
        deadline = Deadline.after_ms(self._settings.timeout_ms)
        remote = pull.remote
        peers = remote.remote_peers
        if not pull.local_blocks:
            self._release_all(remote, deadline)
            return
        claimed: list[Peer] = []
        try:
            layouts = self._sources(remote, deadline)
            for peer, _ in layouts:
                claimed.append(peer)
                self._claim(peer, remote)
            for peer, layout in layouts:
                self._fetch_from(peer, layout, pull, deadline)
        except LLMException:
            for peer in claimed or self._linked(peers):
                self._release_late(peer, remote)
            raise
        held = [self._release(peer, remote, deadline) for peer in claimed]
        self._check_held(remote, all(held))

    def _claim(self, peer: Peer, remote: RemoteBlocks) -> None:
        # Not waited for: it comes before the release, whose answer says whether the lease was there
        # all the time.
        peers = remote.remote_peers
        readers = mapping.readers(self._layout, len(peers), peers.index(peer))
        self._service.datadist.tell(peer[0], encode(Claim(remote.remote_lease, readers)))

    def _release(self, peer: Peer, remote: RemoteBlocks, deadline: Deadline) -> bool:
        answer = self._ask(peer, Release(remote.remote_lease), deadline)
        return msgspec.msgpack.decode(answer, type=Verdict).held

    def _release_all(self, remote: RemoteBlocks, deadline: Deadline) -> None:
        """Nothing is to be fetched; the producer need not keep it."""
        for rank in mapping.sources(self._layout, len(remote.remote_peers)):
            peer = remote.remote_peers[rank]
            self._service.link(peer, _left_ms(deadline))
            self._claim(peer, remote)
            self._release(peer, remote, deadline)

    def _linked(self, peers: Sequence[Peer]) -> list[Peer]:
        """Workers that this one should have claimed the lease of, and can tell that it won't."""
        ranks = mapping.sources(self._layout, len(peers))
        return [peers[rank] for rank in ranks if self._service.is_linked(peers[rank])]

    def _release_late(self, peer: Peer, remote: RemoteBlocks) -> None:
        try:
            self._release(peer, remote, Deadline.after_ms(_RELEASE_MS))
        except LLMException as error:
            logger.debug("the lease %d ends by itself: %s", remote.remote_lease, error)

    @staticmethod
    def _check_held(remote: RemoteBlocks, held: bool) -> None:
        if not held:
            raise error_for(
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
                f"engine {remote.remote_engine_id} has given up the blocks of request"
                f" {remote.remote_request_id}",
                remedy="raise lease_s at the producer if consumers come later than that.",
            )

    # -- what peers have --------------------------------------------------------------------------

    def _sources(self, remote: RemoteBlocks, deadline: Deadline) -> list[tuple[Peer, KVLayout]]:
        """The workers to read from, linked, and what each has."""
        peers = remote.remote_peers
        if remote.digest == self._digest and len(peers) == self._layout.tp_size:
            peer = peers[self._layout.tp_rank]
            self._service.link(peer, _left_ms(deadline))
            return [(peer, self._layout)]
        ranks = mapping.sources(self._layout, len(peers))
        return [(peers[rank], self._described(peers[rank], deadline)) for rank in ranks]

    def _described(self, peer: Peer, deadline: Deadline) -> KVLayout:
        self._service.link(peer, _left_ms(deadline))
        known = self._layouts.get(peer[0])
        if known is None:
            answer = self._ask(peer, Describe(), deadline)
            told = msgspec.msgpack.decode(answer, type=Description)
            reasons = self._fingerprint.differences(told.fingerprint)
            refused = mapping.refusal(self._layout, told.layout)
            if refused:
                reasons.append(refused)
            if reasons:
                raise param_error(
                    f"worker {peer[0]} at {peer[1]}:{peer[2]} has other KV: {'; '.join(reasons)}"
                )
            known = self._layouts[peer[0]] = told.layout
        return known

    def _ask(self, peer: Peer, question: Asked, deadline: Deadline) -> bytes:
        return self._service.datadist.ask(peer[0], encode(question), _left_ms(deadline))

    # -- bytes ------------------------------------------------------------------------------------

    def _fetch_from(self, peer: Peer, layout: KVLayout, pull: Pull, deadline: Deadline) -> None:
        plans = mapping.rows(
            self._layout,
            layout,
            pull.local_blocks,
            pull.remote.remote_block_ids,
            pull.first_token,
            pull.num_tokens,
        )
        for group, (src_rows, dst_rows) in plans.items():
            self.fetch_rows(peer[0], group, src_rows, dst_rows, deadline)
            if self._settings.verify:
                self._verify(peer, pull.remote.remote_lease, group, src_rows, dst_rows, deadline)

    def fetch_rows(
        self,
        peer: int,
        group: int,
        src_rows: torch.Tensor,
        dst_rows: torch.Tensor,
        deadline: Deadline,
    ) -> None:
        """Rows of one blocks cache of a peer into rows of ours. Blocks.

        Raises:
            LLMException: They did not arrive.
        """
        self._service.datadist.cache_manager.pull_blocks(
            BlocksCacheKey(peer, group),
            self._service.caches[group],
            src_rows,
            dst_rows,
            timeout=_left_ms(deadline),
        )

    def _verify(
        self,
        peer: Peer,
        lease: int,
        group: int,
        src_rows: torch.Tensor,
        dst_rows: torch.Tensor,
        deadline: Deadline,
    ) -> None:
        mine = self._service.checksums(group, dst_rows)
        theirs: list[int] = []
        for start in range(0, len(src_rows), _ROWS_PER_QUESTION):
            part = src_rows[start : start + _ROWS_PER_QUESTION]
            question = Checksums(lease, group, part.numpy().tobytes())
            while (sums := self._sums(peer, question, deadline)) is None:
                time.sleep(_SUMS_RETRY_S)
            theirs += sums
        if mine != theirs:
            wrong = sum(a != b for a, b in zip(mine, theirs, strict=True))
            raise error_for(
                LLMStatusCode.LLM_FAILED,
                f"{wrong} of {len(mine)} pieces differ in their checksums from worker {peer[0]}'s",
                peer=peer[0],
            )

    def _sums(self, peer: Peer, question: Checksums, deadline: Deadline) -> list[int] | None:
        answer = self._ask(peer, question, deadline)
        return msgspec.msgpack.decode(answer, type=Sums).sums


def _left_ms(deadline: Deadline) -> int:
    """Milliseconds left, at least one: what is asked for then times out by itself."""
    return max(1, int(deadline.remaining_s() * 1000))
