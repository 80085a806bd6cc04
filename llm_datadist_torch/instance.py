# SPDX-License-Identifier: Apache-2.0
"""What one initialised ``LLMDataDist`` consists of. Several may live in one process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from llm_datadist_torch.cache import Cache
from llm_datadist_torch.catalog import CacheEntry, Catalog
from llm_datadist_torch.config import EngineConfig, PoolConfig
from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.links.owner import Owner
from llm_datadist_torch.links.table import LinkTable
from llm_datadist_torch.memory.allocate import CacheMemory, HostMemory, default_host_memory
from llm_datadist_torch.memory.arena import ArenaMemory
from llm_datadist_torch.transports.base import Transport
from llm_datadist_torch.transports.local import LocalTransport
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.enums import Placement
from llm_datadist_torch.values.status import LLMStatusCode, error_for
from llm_datadist_torch.workers import WorkerPool

MAX_TRANSFERS = 8
"""Background pulls and pushes that run at a time; those on one link take turns."""

MAX_LAYERWISE = 32
"""Layer by layer transfers that run at a time; most of the time they wait for a layer."""


class Instance:
    """Catalog, memory, transports and links of one initialised ``LLMDataDist``.

    Thread safety: all parts are safe by themselves; ``close`` may overlap with other calls, which
    then fail with typed errors.

    Args:
        cluster_id: Its id, unique among linked peers.
        config: Checked configuration.

    Raises:
        LLMOutOfMemoryError: A pool could not be had.
        LLMException: ``listen_ip_info`` can't be bound.
    """

    def __init__(self, cluster_id: int, config: EngineConfig) -> None:
        self.cluster_id = cluster_id
        self.config = config
        self._open = True
        self._pid = os.getpid()
        self.catalog = Catalog(self._on_free)
        self._memories: dict[Placement, CacheMemory] = {
            Placement.DEVICE: _memory(config.device_pool, HostMemory()),
            Placement.HOST: _memory(config.host_pool, default_host_memory()),
        }
        # Apart, so that transfers that wait for layers don't keep others waiting.
        self.transfer_workers = WorkerPool("transfer", MAX_TRANSFERS)
        self.layer_workers = WorkerPool("layers", MAX_LAYERWISE)
        self._caches: weakref.WeakValueDictionary[int, Cache] = weakref.WeakValueDictionary()
        self._caches_lock = threading.Lock()
        self._transports: dict[str, Transport] = {LocalTransport.name: LocalTransport()}
        owner = Owner(self.catalog, consume_keys=not config.remote_accessible)
        self.links = LinkTable(
            cluster_id, owner, self._transports, remote_accessible=config.remote_accessible
        )
        try:
            self.links.endpoint.start(config.listen)
        except ValueError as error:
            self.links.close()
            raise param_error(f"listen_ip_info: {error}", remedy="give ip:port.") from error
        except OSError as error:
            self.links.close()
            raise error_for(LLMStatusCode.LLM_FAILED, str(error), op="init") from error

    def close(self) -> None:
        """End all links and caches.

        Memory that the user still holds tensors of stays valid. Background transfers are cancelled;
        what is being sent is sent to its end, at most for ``sync_kv_timeout``, and a synchronizer
        is not waited for. Idempotent.
        """
        self._open = False
        # A forked child has neither the endpoint's thread nor any right to its sockets.
        if os.getpid() == self._pid:
            deadline = self.deadline()
            for workers in (self.transfer_workers, self.layer_workers):
                workers.close(deadline)
            self.links.close()
        for transport in self._transports.values():
            transport.close()
        with self._caches_lock:
            caches = list(self._caches.values())
        for cache in caches:
            cache.invalidate("finalize")
        self.catalog.clear()
        self._memories.clear()

    @property
    def open(self) -> bool:
        """Whether it can be used: not closed, and not the copy that a forked child has of it."""
        return self._open and os.getpid() == self._pid

    def memory(self, placement: Placement) -> CacheMemory:
        """Where new caches of a placement get their memory.

        Raises:
            LLMParamError: ``placement`` is None.
        """
        if placement not in self._memories:
            raise param_error(f"placement={placement!r} of the cache_desc is no Placement")
        return self._memories[placement]

    def deadline(self) -> Deadline:
        """The time that one transfer has: ``sync_kv_timeout``."""
        return Deadline.after_ms(self.config.sync_timeout_ms)

    # -- the user's handles -----------------------------------------------------------------------

    def track(self, cache: Cache) -> None:
        """Remember a new cache, to be invalidated when it ends."""
        with self._caches_lock:
            self._caches[cache.cache_id] = cache

    def invalidate(self, cache_id: int, ended_by: str) -> None:
        """The cache of this id has ended: its handle, if the user still has it, must refuse use."""
        with self._caches_lock:
            cache = self._caches.pop(cache_id, None)
        if cache is not None:
            cache.invalidate(ended_by)

    def owns(self, cache: Cache) -> bool:
        """Whether this is a live cache of this instance."""
        return self._caches.get(cache.cache_id) is cache

    @contextmanager
    def using(self, cache: Cache) -> Iterator[CacheEntry]:
        """A lease on one of our caches while we work with it.

        It can't be freed or unregistered meanwhile.

        Raises:
            LLMCacheNotFoundError: It has ended, or belongs to another instance, or to none.
        """
        if not self.owns(cache):
            raise error_for(
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
                f"{cache!r} is no cache of cluster {self.cluster_id}",
                cache_id=cache.cache_id,
            )
        entry = self.catalog.find(cache.cache_id)
        self.catalog.lease(entry)
        try:
            yield entry
        finally:
            self.catalog.end_lease(entry)

    def _on_free(self, entry: CacheEntry) -> None:
        if entry.region is not None and entry.owns_region:
            self.links.region_freed(entry.region.region_id)


def _memory(pool: PoolConfig | None, without_pool: CacheMemory) -> CacheMemory:
    return without_pool if pool is None else ArenaMemory(pool)
