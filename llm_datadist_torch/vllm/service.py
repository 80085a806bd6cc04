# SPDX-License-Identifier: Apache-2.0
"""One worker's instance of this library: its caches, its links, and what it answers to peers."""

from __future__ import annotations

import logging
import threading
import zlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from llm_datadist_torch.cache import Cache
from llm_datadist_torch.config import LLMConfig
from llm_datadist_torch.datadist import LLMDataDist
from llm_datadist_torch.values.cache_desc import CacheDesc
from llm_datadist_torch.values.cluster_info import LLMClusterInfo
from llm_datadist_torch.values.enums import LLMRole, Placement
from llm_datadist_torch.values.keys import BlocksCacheKey
from llm_datadist_torch.values.status import LLMStatusCode, error_for
from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.settings import Settings, random_id

logger = logging.getLogger("llm_datadist_torch")

_OK = (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK)


class WorkerService:
    """The instance of one worker, with vLLM's own KV tensors registered.

    Thread safety: all methods may be called from any thread.

    Args:
        settings: The connector's settings.
        rank: Of the worker in its engine.
        groups: One list of 2-D tensors per blocks cache, dimension 0 the rows. Kept alive.

    Raises:
        LLMException: The address can't be bound, or the tensors can't be registered.
    """

    def __init__(
        self, settings: Settings, rank: int, groups: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        self._settings = settings
        cluster_id = settings.cluster_id + rank if settings.cluster_id else random_id()
        device = groups[0][0].device
        config = LLMConfig()
        config.enable_cache_manager = True
        # A pull of a cache that is known then sends no message.
        config.enable_remote_cache_accessible = True
        config.device = device.type
        config.device_id = device.index or 0
        port = settings.port + rank if settings.port else 0
        config.listen_ip_info = f"{settings.host}:{port}"
        config.sync_kv_timeout = settings.timeout_ms
        config.heartbeat_interval = int(settings.heartbeat_s * 1000)
        # A peer that was lost is linked anew by the next transfer; it may be another process.
        config.auto_relink = False
        self.datadist = LLMDataDist(LLMRole.MIX, cluster_id)
        self.datadist.init(config.generate_options())
        self._dialing: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()
        try:
            self.caches = [self.register(at, group) for at, group in enumerate(groups)]
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
        return self.datadist.cluster_id, self._settings.host, found[1] if found else 0

    def link(self, peer: Peer, timeout_ms: int) -> None:
        """Link to a peer unless that is done already. Blocks.

        Raises:
            LLMLinkError: It can't be reached.
        """
        cluster_id, host, port = peer
        with self._turn(cluster_id):
            if self.is_linked(peer):
                return
            cluster = LLMClusterInfo()
            cluster.remote_cluster_id = cluster_id
            cluster.append_local_ip_info(self._settings.host, 0)
            cluster.append_remote_ip_info(host, port)
            status, _ = self.datadist.link_clusters([cluster], timeout=timeout_ms)
        if status not in _OK:
            raise error_for(
                status,
                f"worker {cluster_id} at {host}:{port} can't be linked: {status.name}",
                peer=cluster_id,
            )

    def is_linked(self, peer: Peer) -> bool:
        """Whether there is a link to a peer now."""
        return self._state(peer[0]) == "linked"

    def forget(self, peer: int) -> None:
        """Drop the link to a peer if it is lost: one that comes back is linked anew. Blocks."""
        cluster = LLMClusterInfo()
        cluster.remote_cluster_id = peer
        cluster.append_local_ip_info(self._settings.host, 0)
        with self._turn(peer):
            # It may have been linked again meanwhile.
            if self._state(peer) == "lost":
                self.datadist.unlink_clusters(
                    [cluster], timeout=self._settings.timeout_ms, force=True
                )
        with self._lock:
            self._dialing.pop(peer, None)

    def _turn(self, peer: int) -> threading.Lock:
        with self._lock:
            return self._dialing.setdefault(peer, threading.Lock())

    def _state(self, peer: int) -> str | None:
        return next((link.state for link in self.datadist.links() if link.peer == peer), None)

    def checksums(self, group: int, rows: torch.Tensor) -> list[int]:
        """One checksum per row, over all layers: see :func:`over_layers`. Takes a while."""
        layers = range(len(self.caches[group].tensors))
        return [
            over_layers([self.checksum(group, layer, row) for layer in layers])
            for row in rows.tolist()
        ]

    def checksum(self, group: int, layer: int, row: int) -> int:
        """Of one row of one layer."""
        # A device's memory comes to the host for this; host memory is read where it is.
        data: Any = self.caches[group].tensors[layer][row].cpu().numpy()
        return zlib.crc32(data)

    def close(self) -> None:
        """End everything. Waits for transfers that are under way."""
        self.datadist.finalize()


def over_layers(sums: Sequence[int]) -> int:
    """One checksum of those of all layers of a row, in their order."""
    return zlib.crc32(array("I", sums).tobytes())
