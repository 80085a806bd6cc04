# SPDX-License-Identifier: Apache-2.0
"""The consumer's side in a worker: leases of requests that wait for their turn are kept."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import partial

import msgspec

from llm_datadist_torch.values.status import LLMException
from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.protocol import Claim, Verdicts
from llm_datadist_torch.vllm.settings import Settings
from llm_datadist_torch.vllm.steps import Renewal
from llm_datadist_torch.vllm.worker.pulling import Puller
from llm_datadist_torch.vllm.worker.service import TimeLimit, WorkerService

logger = logging.getLogger("llm_datadist_torch")

PER_LEASE = 3
"""Claims in the time that a lease lasts."""
_EARLY_S = 0.05


@dataclass(frozen=True)
class _Kept:
    """What is claimed for one request of one worker."""

    request_id: str
    lease: int
    readers: int


class Renewer:
    """Claims leases again and again, one message for all of a peer's.

    Thread safety: all methods may be called from any thread, and don't block.

    Args:
        service: This worker's instance.
        settings: The connector's settings.
        puller: It knows which workers a request reads from.
    """

    def __init__(self, service: WorkerService, settings: Settings, puller: Puller) -> None:
        self._service = service
        self._settings = settings
        self._puller = puller
        self._lock = threading.Lock()
        self._kept: dict[Peer, dict[str, _Kept]] = {}
        self._looping: set[Peer] = set()
        self._lost: set[str] = set()

    def keep(self, renewal: Renewal) -> None:
        """Keep the lease of a request from now on."""
        interval_s = renewal.remote.remote_lease_s / PER_LEASE
        try:
            workers = self._puller.sources(renewal.remote)
        except LLMException:
            # The pull will say so.
            return
        for worker in workers:
            peer = renewal.remote.remote_peers[worker]
            if peer.life == self._service.life:
                continue
            readers = self._puller.readers(renewal.remote, worker)
            kept = _Kept(renewal.request_id, renewal.remote.remote_lease, readers)
            with self._lock:
                self._kept.setdefault(peer, {})[renewal.request_id] = kept
                is_first = peer not in self._looping
                self._looping.add(peer)
            lane = "hold", peer.cluster_id
            self._service.lanes.submit(lane, partial(self._claim_new, peer, renewal.request_id))
            if is_first:
                self._service.lanes.later(interval_s, lane, partial(self._loop, peer, interval_s))

    def drop(self, request_id: str) -> None:
        """A request's lease need not be kept any more: it is pulled, or nobody wants it."""
        with self._lock:
            for peer, of_peer in list(self._kept.items()):
                of_peer.pop(request_id, None)
                if not of_peer:
                    del self._kept[peer]
            self._lost.discard(request_id)

    def take_lost(self) -> set[str]:
        """Requests whose leases were found to have ended since the last call."""
        with self._lock:
            lost, self._lost = self._lost, set()
        return lost

    # -- the jobs ---------------------------------------------------------------------------------

    def _claim_new(self, peer: Peer, request_id: str) -> None:
        """The first claim for a request, which its producer may not know yet."""
        with self._lock:
            kept = self._kept.get(peer, {}).get(request_id)
        if kept is not None and self._claim(peer, [kept]):
            job = partial(self._claim_new, peer, request_id)
            self._service.lanes.later(_EARLY_S, ("hold", peer.cluster_id), job)

    def _loop(self, peer: Peer, interval_s: float) -> None:
        """Claim all of a peer's, until there are none."""
        with self._lock:
            kept = list(self._kept.get(peer, {}).values())
            if not kept:
                self._looping.discard(peer)
                return
        self._claim(peer, kept)
        job = partial(self._loop, peer, interval_s)
        self._service.lanes.later(interval_s, ("hold", peer.cluster_id), job)

    def _claim(self, peer: Peer, kept: list[_Kept]) -> bool:
        """Claim; whether some are so new that the engine there has not said so yet."""
        try:
            return self._try_claim(peer, kept)
        except LLMException as error:
            # The pull will say so, if the peer does not come back.
            logger.debug("leases at %s are not renewed: %s", peer, error)
            return False

    def _try_claim(self, peer: Peer, kept: list[_Kept]) -> bool:
        limit = TimeLimit(self._settings.timeout_s)
        self._service.meet(peer, limit)
        early = False
        for readers in {each.readers for each in kept}:
            some = [each for each in kept if each.readers == readers]
            claim = Claim(peer.life, tuple(each.lease for each in some), readers)
            answer = self._service.request(peer.cluster_id, claim, limit)
            held = msgspec.msgpack.decode(answer, type=Verdicts).held
            early |= None in held
            with self._lock:
                of_peer = self._kept.get(peer, {})
                for each, there in zip(some, held, strict=False):
                    if there is False and of_peer.get(each.request_id) == each:
                        self._lost.add(each.request_id)
                        del of_peer[each.request_id]
        return early
