# SPDX-License-Identifier: Apache-2.0
"""One worker's instance of this library: its caches, its links, and what it says to peers."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from llm_datadist_torch.api.datadist import LLMDataDist
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.values.cache_desc import CacheDesc
from llm_datadist_torch.values.cluster_info import LLMClusterInfo
from llm_datadist_torch.values.config import LLMConfig
from llm_datadist_torch.values.enums import LLMRole, Placement
from llm_datadist_torch.values.keys import BlocksCacheKey
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for
from llm_datadist_torch.vllm import addresses
from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.protocol import Asked, Describe, Description, encode
from llm_datadist_torch.vllm.settings import Endpoint, Settings
from llm_datadist_torch.vllm.worker.lanes import Lanes

logger = logging.getLogger("llm_datadist_torch")

_OK = (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK)

REMEMBER_S = 1.0
"""Seconds for which a peer that could not be linked is not tried again."""


class TimeLimit:
    """Until when something may take."""

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._ends_at - time.monotonic())

    @property
    def left_ms(self) -> int:
        """Milliseconds left, at least 1: what is asked for then times out by itself."""
        return max(1, int(self.left_s * 1000))

    @property
    def expired(self) -> bool:
        """Whether there is none left."""
        return self.left_s <= 0


@dataclass
class _Dial:
    """An attempt to link that everybody who wants that link waits for."""

    within_s: float
    ended: threading.Event = field(default_factory=threading.Event)
    error: LLMException | None = None
    ended_at: float = 0.0

    def is_old(self) -> bool:
        """Whether it ended so long ago that another may be tried."""
        return self.ended.is_set() and time.monotonic() - self.ended_at > REMEMBER_S


class WorkerService:
    """The instance of one worker, with vLLM's own KV tensors registered.

    Thread safety: all methods may be called from any thread.

    Args:
        settings: The connector's settings.
        endpoint: Where it listens, and what it is called.
        caches: One list of 2-D tensors per blocks cache, dimension 0 the rows. Kept alive.

    Raises:
        LLMException: The address can't be bound, or the tensors can't be registered.
    """

    def __init__(
        self, settings: Settings, endpoint: Endpoint, caches: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        self._settings = settings
        self._endpoint = endpoint
        self.life = secrets.token_hex(8)
        self.lanes = Lanes("vllm", settings.threads)
        device = caches[0][0].device
        config = LLMConfig()
        config.enable_cache_manager = True
        # A pull of a cache that is known then sends no message.
        config.enable_remote_cache_accessible = True
        config.device = device.type
        config.device_id = device.index or 0
        config.listen_ip_info = addresses.listen_text(endpoint.listen, endpoint.port)
        config.sync_kv_timeout = settings.timeout_ms
        # A peer that was lost is relinked by the next transfer; it may be another process.
        config.auto_relink = False
        self.datadist = LLMDataDist(LLMRole.MIX, endpoint.cluster_id)
        self.datadist.init(config.generate_options())
        self._lock = threading.Lock()
        self._dials: dict[tuple[int, str, int], _Dial] = {}
        self._met: dict[int, Description] = {}
        try:
            self.caches = [self.register(at, each) for at, each in enumerate(caches)]
        except BaseException:
            self.datadist.finalize()
            raise

    def register(self, model_id: int, tensors: Sequence[torch.Tensor]) -> Cache:
        """Let peers reach 2-D tensors under this name, besides other names that they have."""
        desc = CacheDesc(len(tensors), list(tensors[0].shape), tensors[0].dtype, Placement.DEVICE)
        return self.datadist.cache_manager.register_blocks_cache(
            desc,
            list(tensors),
            BlocksCacheKey(self.datadist.cluster_id, model_id),
            remote_accessible=True,
        )

    @property
    def address(self) -> Peer:
        """How peers find it."""
        found = self.datadist.listen_address
        return Peer(
            self.datadist.cluster_id,
            self._endpoint.advertised,
            found[1] if found else 0,
            self.life,
        )

    # -- peers ------------------------------------------------------------------------------------

    def meet(self, peer: Peer, limit: TimeLimit) -> Description:
        """Link to a peer unless that is done already, and learn its identity. Blocks.

        Raises:
            LLMLinkError: It can't be reached.
            LLMException: Another worker, or another life of it, answers; or none does.
        """
        self.link(peer, limit)
        told = self._met.get(peer.cluster_id)
        if told is None:
            answer = self.request(peer.cluster_id, Describe(), limit)
            told = msgspec.msgpack.decode(answer, type=Description)
            with self._lock:
                self._met[peer.cluster_id] = told
        if peer.life and told.life != peer.life:
            raise error_for(
                LLMStatusCode.LLM_LINK_FAILED,
                f"{peer} is another worker now: its life is {told.life}, and {peer.life} was meant",
                peer=peer.cluster_id,
                remedy="it was started anew, or two engines have one cluster_id: leave cluster_id"
                " unset, or give each engine its own.",
            )
        return told

    def link(self, peer: Peer, limit: TimeLimit) -> None:
        """Link to a peer unless that is done already. Blocks, at most for the time limit.

        Threads that want one link share one attempt; each waits for its own time only. That it has
        failed is remembered for :data:`REMEMBER_S`.

        Raises:
            LLMLinkError: It can't be reached.
        """
        key = peer.cluster_id, peer.host, peer.port
        while not self.is_linked(peer):
            dial, mine = self._join_dial(key, limit)
            if mine:
                self._dial(peer, dial, limit)
            elif not dial.ended.wait(limit.left_s):
                raise error_for(
                    LLMStatusCode.LLM_TIMEOUT, f"{peer} does not answer", peer=peer.cluster_id
                )
            if dial.error is not None and (mine or limit.left_s <= dial.within_s + REMEMBER_S):
                raise error_for(dial.error.status_code, dial.error.args[0], peer=peer.cluster_id)
            # It was linked; or somebody who has had less time has given up.
            with self._lock:
                if self._dials.get(key) is dial:
                    del self._dials[key]

    def _join_dial(self, key: tuple[int, str, int], limit: TimeLimit) -> tuple[_Dial, bool]:
        """The attempt that is under way or has just failed; else a new one, and True."""
        with self._lock:
            for other in [each for each, dial in self._dials.items() if dial.is_old()]:
                del self._dials[other]
            if key in self._dials:
                return self._dials[key], False
            dial = self._dials[key] = _Dial(limit.left_s)
            return dial, True

    def _dial(self, peer: Peer, dial: _Dial, limit: TimeLimit) -> None:
        try:
            self._try_link(peer, limit)
        except LLMException as error:
            dial.error = error
        finally:
            dial.ended_at = time.monotonic()
            dial.ended.set()

    def _try_link(self, peer: Peer, limit: TimeLimit) -> None:
        try:
            host = addresses.address_of(peer.host)
        except ValueError as error:
            raise error_for(LLMStatusCode.LLM_LINK_FAILED, f"{peer}: {error}") from None
        if self._state(peer.cluster_id) == "lost":
            self._unlink(peer.cluster_id)
        cluster = LLMClusterInfo()
        cluster.remote_cluster_id = peer.cluster_id
        cluster.append_local_ip_info("::1" if ":" in host else "127.0.0.1", 0)
        cluster.append_remote_ip_info(host, peer.port)
        status, _ = self.datadist.link_clusters([cluster], timeout=limit.left_ms)
        if status not in _OK:
            raise error_for(status, f"{peer} can't be linked: {status.name}", peer=peer.cluster_id)

    def is_linked(self, peer: Peer) -> bool:
        """Whether there is a link to a peer now."""
        return self._state(peer.cluster_id) == "linked"

    def link_changed(self, peer: int, *, lost: bool) -> None:
        """A link event: what was known of the peer went with its link. Does not block."""
        with self._lock:
            self._met.pop(peer, None)
        if lost:
            self.lanes.submit(("forget", peer), lambda: self._forget(peer))

    def _forget(self, peer: int) -> None:
        # It may have been linked again meanwhile.
        if self._state(peer) == "lost":
            self._unlink(peer)

    def _unlink(self, peer: int) -> None:
        cluster = LLMClusterInfo()
        cluster.remote_cluster_id = peer
        cluster.append_local_ip_info("127.0.0.1", 0)
        self.datadist.unlink_clusters([cluster], timeout=self._settings.timeout_ms, force=True)

    def _state(self, peer: int) -> str | None:
        return next((link.state for link in self.datadist.links() if link.peer == peer), None)

    def request(self, peer: int, question: Asked, limit: TimeLimit) -> bytes:
        """Ask a linked peer, and wait for its answer.

        Raises:
            LLMException: As for ``LLMDataDist.request``.
        """
        return self.datadist.request(peer, encode(question), limit.left_ms)

    def send(self, peer: int, question: Asked) -> None:
        """Ask a linked peer, without waiting for its answer.

        Raises:
            LLMException: As for ``LLMDataDist.send``.
        """
        self.datadist.send(peer, encode(question))

    # -- bytes ------------------------------------------------------------------------------------

    def checksums(self, cache: int, rows: torch.Tensor, layers: range) -> list[int]:
        """One checksum per row, over some layers: see :func:`over_layers`. Takes a while."""
        return [
            over_layers([self.checksum(cache, layer, row) for layer in layers])
            for row in rows.tolist()
        ]

    def checksum(self, cache: int, layer: int, row: int) -> int:
        """Of one row of one layer."""
        # A device's memory comes to the host for this; host memory is read where it is.
        data: Any = self.caches[cache].tensors[layer][row].cpu().numpy()
        return zlib.crc32(data)

    def close(self, timeout_s: float) -> None:
        """End everything. Waits for transfers that are under way."""
        self.lanes.close(timeout_s)
        self.datadist.finalize()


def over_layers(sums: Sequence[int]) -> int:
    """One checksum of those of all layers of a row, in their order."""
    return zlib.crc32(array("I", sums).tobytes())


def until_known(query: Callable[[], bool | None], limit: TimeLimit, every_s: float) -> bool | None:
    """Ask again until the answer is not None, or the time has passed. Blocks."""
    while True:
        held = query()
        if held is not None or limit.expired:
            return held
        time.sleep(min(every_s, limit.left_s))
