# SPDX-License-Identifier: Apache-2.0
"""How caches come and go: allocate, register, deallocate, unregister (reference API, 9.1)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.caches.entry import CacheEntry, name_of
from llm_datadist_torch.caches.guard import make_guard
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.memory.adopt import Adopted, Given, adopt, check_given, storage_form
from llm_datadist_torch.memory.arena import ArenaMemory
from llm_datadist_torch.values.cache_desc import CacheDesc
from llm_datadist_torch.values.checks import (
    check_int64,
    check_isinstance,
    check_timeout_ms,
    param_error,
)
from llm_datadist_torch.values.enums import Placement
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey
from llm_datadist_torch.values.layout import Layout, layout_of
from llm_datadist_torch.values.status import LLMException

logger = logging.getLogger("llm_datadist_torch")

Keys = Sequence[CacheKey] | Sequence[BlocksCacheKey]


def check_keys(cache_keys: Sequence[CacheKey]) -> None:
    """Check the type of a ``cache_keys`` argument."""
    check_isinstance("cache_keys", cache_keys, (list, tuple), CacheKey, allow_none=False)


def blocks_keys(blocks_cache_key: BlocksCacheKey | None) -> Sequence[BlocksCacheKey]:
    """Check the type of a ``blocks_cache_key`` argument; None means no key."""
    check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
    return () if blocks_cache_key is None else (blocks_cache_key,)


def allocate(instance: Instance, desc: CacheDesc, keys: Keys, *, paged: bool) -> Cache:
    """Make a cache in new memory. The argument types of ``keys`` have been checked."""
    # None gets as far as in the reference: AttributeError at the first use.
    layout = layout_of(desc.num_tensors, desc.dims, _size(desc), paged=paged)
    return _publish(instance, desc, _allocated_entry(instance, desc, layout), keys)


def _allocated_entry(instance: Instance, desc: CacheDesc, layout: Layout) -> CacheEntry:
    """An entry with new memory, and the only thing that refers to it."""
    memory = instance.memory(desc.placement)
    allocation = memory.allocate(desc.num_tensors, *storage_form(desc.dims, desc.data_type))
    cache_id = instance.catalog.next_id()
    addrs = torch.tensor([tensor.data_ptr() for tensor in allocation.tensors], dtype=torch.int64)
    return CacheEntry(
        cache_id=cache_id,
        layout=layout,
        tensors=allocation.tensors,
        addrs=addrs,
        guard=_guard(cache_id, addrs, layout, allocation.tensors),
        owned=True,
        rows_first=desc.batch_dim == 0,
        remote_accessible=True,
        region=allocation.region,
        flag=allocation.flag,
        owner=allocation.owner,
        owns_region=not isinstance(memory, ArenaMemory),
    )


def register(
    instance: Instance,
    desc: CacheDesc,
    given: Given,
    keys: Keys,
    remote_accessible: bool | None,
    *,
    paged: bool,
) -> Cache:
    """Make a cache of the caller's memory. The argument types have been checked."""
    if not given:
        raise param_error("addrs is empty")
    layout = layout_of(desc.num_tensors, desc.dims, _size(desc), paged=paged)
    adopted: Adopted = adopt(given, desc, layout, instance.device_of(desc.placement))
    if remote_accessible is None:
        # In two-sided mode the reference moves host memory by copies of its own, so it needs no
        # flag (reference API, 8.6 and 9.3).
        remote_accessible = (
            not instance.config.remote_accessible or desc.placement == Placement.DEVICE
        )
    cache_id = instance.catalog.next_id()
    entry = CacheEntry(
        cache_id=cache_id,
        layout=adopted.layout,
        tensors=adopted.tensors,
        addrs=adopted.addrs,
        guard=_guard(cache_id, adopted.addrs, adopted.layout, adopted.watched),
        owned=False,
        rows_first=desc.batch_dim == 0,
        remote_accessible=remote_accessible,
        unowned=adopted.unowned,
    )
    return _publish(instance, desc, entry, keys)


def _guard(
    cache_id: int, addrs: torch.Tensor, layout: Layout, watched: tuple[torch.Tensor, ...]
) -> _C.CacheGuard:
    return make_guard(f"cache {cache_id}", addrs, layout.extent, watched, cache_id)


def check_register_types(desc: CacheDesc, addrs: object, remote_accessible: bool | None) -> None:
    """The type checks that both registrations share (reference API, 9.1, steps 1, 2 and 4)."""
    check_isinstance("cache_desc", desc, CacheDesc)
    check_given(addrs)
    check_isinstance("remote_accessible", remote_accessible, bool)


def deallocate(instance: Instance, cache: Cache, *, paged: bool) -> None:
    """Deallocate an allocated cache (reference API, 8.5).

    On a registered cache this does nothing (section 14, 48).
    """
    check_isinstance("cache", cache, Cache, allow_none=False)
    _check_kind(cache, paged=paged)
    if cache.ended:
        return
    operation = "deallocate_blocks_cache" if paged else "deallocate_cache"
    if cache.cache_id < 0:
        cache.invalidate(operation)
    elif not instance.owns(cache):
        raise param_error(f"{cache!r} is no cache of cluster {instance.cluster_id}")
    elif cache.is_registered:
        logger.warning(
            "%s: cache %d is registered; unregister_cache() ends it", operation, cache.cache_id
        )
    else:
        instance.invalidate(cache.cache_id, operation)
        instance.catalog.release_id(cache.cache_id)


def unregister(instance: Instance, cache_id: int, timeout: int | None = None) -> None:
    """Forget a registered cache after its transfers; refuse an allocated one (section 14, 23)."""
    cache_id = check_int64("cache_id", cache_id)
    deadline = instance.deadline(None if timeout is None else check_timeout_ms(timeout))
    entry = instance.catalog.get(cache_id)
    if entry is None:
        return
    if entry.owned:
        raise param_error(f"cache {cache_id} is allocated, not registered", remedy="deallocate it.")
    instance.catalog.unregister(cache_id, deadline)
    instance.invalidate(cache_id, "unregister_cache")


def remove_key(instance: Instance, cache_key: CacheKey) -> None:
    """Unbind a key; unknown keys and keys of registered caches are left alone."""
    check_isinstance("cache_key", cache_key, CacheKey, allow_none=False)
    instance.catalog.remove_key(name_of(cache_key))


def _publish(instance: Instance, desc: CacheDesc, entry: CacheEntry, keys: Keys) -> Cache:
    """Enter a cache in the catalog and hand it out; on an error ``entry`` loses its memory."""
    # The handle must not hold the entry, or it would keep the memory after its end.
    layout, owned = entry.layout, entry.owned

    def end(cache: Cache) -> None:
        if owned:
            deallocate(instance, cache, paged=layout.paged)
        else:
            unregister(instance, cache.cache_id)

    try:
        instance.publish(entry, keys)
    except LLMException:
        # The traceback keeps this frame, and so the entry, for as long as the caller looks at the
        # error; the memory must be free for another attempt by then.
        entry.drop_memory()
        entry.region = None
        raise
    cache = Cache(
        entry.cache_id,
        desc,
        entry.tensors,
        layout,
        is_registered=not entry.owned,
        is_unowned=entry.unowned,
        guard=entry.guard,
        end=end,
    )
    instance.track(cache)
    return cache


def _size(desc: CacheDesc) -> int:
    if desc.num_tensors < 1:
        raise param_error(f"num_tensors={desc.num_tensors}, but a cache needs at least 1 tensor")
    if desc.data_type is None:
        raise param_error("the cache_desc has no data_type")
    return desc.size


def _check_kind(cache: Cache, *, paged: bool) -> None:
    if cache.is_blocks_cache != paged:
        kinds = ("contiguous", "a blocks cache")
        raise param_error(
            f"cache {cache.cache_id} is {kinds[cache.is_blocks_cache]}, not {kinds[paged]}"
        )
