# SPDX-License-Identifier: Apache-2.0
"""What one initialised ``LLMDataDist`` consists of. Several may live in one process."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.caches.catalog import Catalog
from llm_datadist_torch.caches.entry import CacheEntry
from llm_datadist_torch.links.communicators import Communicators
from llm_datadist_torch.links.table import LinkTable
from llm_datadist_torch.links.workers import WorkerPool
from llm_datadist_torch.memory.address import HOST
from llm_datadist_torch.memory.allocate import CacheMemory
from llm_datadist_torch.memory.arena import ArenaMemory
from llm_datadist_torch.memory.device import choose_device
from llm_datadist_torch.net.descriptors import FOR_AN_INSTANCE, need_descriptors
from llm_datadist_torch.observe.transfers import TransferLog
from llm_datadist_torch.serving.owner import Owner
from llm_datadist_torch.serving.peer import Grant
from llm_datadist_torch.transports.base import MemorySpan, joined_spans, spans_in_storages
from llm_datadist_torch.transports.choice import TransportSet
from llm_datadist_torch.transports.registry import open_transports
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.config import EngineConfig
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.enums import Placement
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey
from llm_datadist_torch.values.status import LLMStatusCode, error_for

MAX_TRANSFERS = 8
"""Background pulls and pushes that run at a time; in no order."""

MAX_LAYERWISE = 32
"""Layer by layer transfers that run at a time; most of the time they wait for a layer."""


MAX_LINKING = 16
"""Communicators that are prepared at a time (reference API, 11.4)."""


_this_process = object()
"""Another one in a forked child. Asking the kernel would be the one system call of a known pull."""


def _on_fork() -> None:
    global _this_process
    _this_process = object()


os.register_at_fork(after_in_child=_on_fork)


class Instance:
    """Catalog, memory, transports and links of one initialised ``LLMDataDist``.

    Thread safety: all parts are safe by themselves; ``close`` may overlap with other calls, which
    then fail with typed errors.

    Args:
        cluster_id: Its id, unique among linked peers.
        config: Checked configuration.

    Attributes:
        cluster_id: Its id.
        config: Its configuration.
        device: What ``Placement.DEVICE`` means.
        transfers: Counts what its transfers do.

    Raises:
        LLMOutOfMemoryError: A pool could not be had.
        LLMFeatureNotEnabledError: The device can't be used.
        LLMParamError: There is no device of this index.
        LLMException: ``listen_ip_info`` can't be bound, or too few descriptors are left.
    """

    def __init__(self, cluster_id: int, config: EngineConfig) -> None:
        need_descriptors(FOR_AN_INSTANCE, "init")
        self.cluster_id = cluster_id
        self.config = config
        self._open = True
        self._process = _this_process
        self.catalog = Catalog(self._on_free)
        self.transfers = TransferLog()
        self.device = choose_device(config.device, config.device_id)
        # Apart, so that transfers that wait for layers don't keep others waiting.
        self.transfer_workers = WorkerPool("transfer", MAX_TRANSFERS, self.device.enter_thread)
        self.layer_workers = WorkerPool("layers", MAX_LAYERWISE, self.device.enter_thread)
        self._caches: weakref.WeakValueDictionary[int, Cache] = weakref.WeakValueDictionary()
        self._caches_lock = threading.Lock()
        owner = Owner(
            self.catalog,
            consume_keys=not config.remote_accessible,
            orphans=config.orphan_policy,
        )
        with self.device.current(), ExitStack() as undo:
            self._memories: dict[Placement, CacheMemory] = {
                Placement.DEVICE: self.device.memory(config.device_pool),
                Placement.HOST: self.device.host_memory(config.host_pool),
            }
            self._transports: TransportSet = open_transports(config, self.device.device)
            undo.callback(self._transports.close)
            self.links = LinkTable(cluster_id, owner, self._transports, config)
            undo.callback(lambda: self.links.close(self.deadline()))
            self.communicators = Communicators(self.links, WorkerPool("link", MAX_LINKING))
            self._transports.register(self._pool_spans())
            self._listen()
            undo.pop_all()

    def _listen(self) -> None:
        self.links.questions.enter_thread = self.device.enter_thread
        try:
            self.links.endpoint.start(self.config.listen, self.device.enter_thread)
        except ValueError as error:
            raise param_error(f"listen_ip_info: {error}", remedy="give ip:port.") from error
        except OSError as error:
            raise error_for(LLMStatusCode.LLM_FAILED, str(error), op="init") from error

    def close(self, timeout_ms: int | None = None) -> None:
        """End all links and caches.

        Memory that the user still holds tensors of stays valid. Background transfers are cancelled;
        what is being sent is sent to its end, at most for ``timeout_ms`` or ``sync_kv_timeout``,
        and a synchronizer is not waited for. Idempotent; one that was interrupted can be called
        again, and does what is left.

        Raises:
            LLMException: LLM_LINK_BUSY: all has been ended, but a peer may still write to memory
                that the caller owns.
        """
        self._open = False
        # A forked child has neither the endpoint's thread nor any right to its sockets.
        if self._process is _this_process:
            deadline = self.deadline(timeout_ms)
            self.communicators.close(deadline)
            for workers in (self.transfer_workers, self.layer_workers):
                workers.close(deadline)
            self.links.close(deadline)
            self._transports.close()
            # Peers may have device memory open a moment longer.
            self._transports.retire(self._pool_spans(), list(self._memories.values()))
            self.catalog.for_each_in_use(lambda entry: self._unpublish(entry, deadline))
        with self._caches_lock:
            caches = list(self._caches.values())
        for cache in caches:
            cache.invalidate("finalize")
        self.catalog.clear()
        self._memories.clear()
        _check_late_writers(self.links.late)

    @property
    def open(self) -> bool:
        """Whether it can be used: not closed, and not the copy that a forked child has of it."""
        return self._open and self._process is _this_process

    @property
    def transports(self) -> TransportSet:
        """Its transports, and why it does not have others."""
        return self._transports

    def memory(self, placement: Placement) -> CacheMemory:
        """Where new caches of a placement get their memory.

        Raises:
            LLMParamError: ``placement`` is None.
        """
        if placement not in self._memories:
            raise param_error(f"placement={placement!r} of the cache_desc is no Placement")
        return self._memories[placement]

    def device_of(self, placement: Placement) -> torch.device:
        """Where memory of a placement must be."""
        return self.device.device if placement == Placement.DEVICE else HOST

    def deadline(self, timeout_ms: int | None = None) -> Deadline:
        """The time that one transfer has: its own, or ``sync_kv_timeout``."""
        budget_ms = self.config.sync_timeout_ms if timeout_ms is None else timeout_ms
        return Deadline(time.monotonic_ns() + budget_ms * 1_000_000, budget_ms)

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

    def handle(self, cache_id: int) -> Cache | None:
        """The program's ``Cache`` of an id; None where it has dropped it, or there is none.

        A cache that was dropped stays, as in the reference, because peers may name it.
        """
        return self._caches.get(cache_id)

    def owns(self, cache: Cache) -> bool:
        """Whether this is a live cache of this instance."""
        return self._caches.get(cache.cache_id) is cache

    def using(self, cache: Cache) -> _C.Lease[CacheEntry]:
        """A lease on one of our caches while we work with it; as a context manager, its entry.

        It can't be freed or unregistered meanwhile.

        Raises:
            LLMCacheNotFoundError: It has ended, or belongs to another instance, or to none; or one
                of its tensors has moved.
        """
        if self._caches.get(cache.cache_id) is not cache:
            raise error_for(
                LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
                f"{cache!r} is no cache of cluster {self.cluster_id}",
                cache_id=cache.cache_id,
            )
        entry = self.catalog.find(cache.cache_id)
        return entry.guard.acquire(entry)

    # -- what transports must know ----------------------------------------------------------------

    def publish(self, entry: CacheEntry, keys: Sequence[CacheKey | BlocksCacheKey]) -> None:
        """Enter a new cache in the catalog, its memory reachable for peers; all or nothing.

        Raises:
            LLMParamError: As :meth:`Catalog.add`, or memory that a transport can't register.
            LLMException: A transport could not register it.
        """
        spans = self._spans_of(entry)
        self._transports.register(spans)
        try:
            self.catalog.add(entry, keys)
        except BaseException:
            self._transports.unregister(spans, self.deadline())
            raise

    def _pool_spans(self) -> list[MemorySpan]:
        return [
            MemorySpan(memory.region.address, memory.region.nbytes, self.device_of(placement))
            for placement, memory in self._memories.items()
            if isinstance(memory, ArenaMemory)
        ]

    def _spans_of(self, entry: CacheEntry) -> list[MemorySpan]:
        """What must be registered for a cache; the region of a pool has been, once for all."""
        region = entry.region
        if region is not None:
            span = MemorySpan(region.address, region.nbytes, entry.device)
            return [span] if entry.owns_region else []
        # Nobody else may reach it in this mode, and we may not move it either.
        if self.config.remote_accessible and not entry.remote_accessible:
            return []
        spans = joined_spans(entry.addrs.tolist(), entry.layout.extent, entry.device)
        if entry.unowned:
            return spans
        storages = [tensor.untyped_storage() for tensor in entry.tensors]
        return spans_in_storages(spans, [(each.data_ptr(), each.nbytes()) for each in storages])

    def _on_free(self, entry: CacheEntry, deadline: Deadline | None) -> None:
        # First of all: the engines must not reach memory that is being freed.
        self._unpublish(entry, deadline or self.deadline())
        if entry.region is not None and entry.owns_region:
            self.links.region_freed(entry.region.region_id)

    def _unpublish(self, entry: CacheEntry, deadline: Deadline) -> None:
        if entry.unowned:
            self._transports.unregister(self._spans_of(entry), deadline)
        else:
            self._transports.retire(self._spans_of(entry), entry.tensors)


def _check_late_writers(late: Sequence[Grant]) -> None:
    """Raise if a peer may still write to memory that the caller owns; ours nobody else gets."""
    entries = {id(grant.entry): grant.entry for grant in late if not grant.entry.owned}
    if entries:
        caches = ", ".join(str(entry.cache_id) for entry in entries.values())
        raise error_for(
            LLMStatusCode.LLM_LINK_BUSY,
            "everything has been ended, but for a peer's push to the memory registered as cache"
            f" {caches}: it may still write there",
            op="finalize",
            remedy="keep that memory until the peer's process has ended its push, or itself.",
        )
