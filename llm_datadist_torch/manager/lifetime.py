# SPDX-License-Identifier: Apache-2.0
"""The public operations that make and end caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_datadist_torch.cache import Cache
from llm_datadist_torch.manager.base import ManagerBase
from llm_datadist_torch.operations import creation, remapping
from llm_datadist_torch.values.cache_desc import CacheDesc
from llm_datadist_torch.values.checks import check_isinstance, param_error
from llm_datadist_torch.values.enums import Placement
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey
from llm_datadist_torch.values.mem_info import MemInfo
from llm_datadist_torch.values.status import LLMStatusCode

if TYPE_CHECKING:
    import torch


class CacheLifetime(ManagerBase):
    """Allocate, register, deallocate, unregister."""

    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: Sequence[CacheKey] = ()) -> Cache:
        """Make a contiguous cache in new memory (reference API, 9.1).

        Args:
            cache_desc: ``num_tensors`` tensors of ``shape``; dimension 0 is the batch. Not changed.
            cache_keys: Names for the rows, position = row; ``CacheKey(req_id=2**64-1)`` skips a
                row. Their cluster id is ignored.

        Returns:
            A cache that owns its memory: one region that starts on a 2 MiB boundary, tensors at 64
            KiB-aligned offsets; or, with a pool configured (``mem_pool_cfg``,
            ``host_mem_pool_cfg``), whole pages of the pool. The contents are not defined.

        Raises:
            LLMParamError: A shape that is no cache, too many keys, a key that is given twice or
                bound already.
            LLMOutOfMemoryError: No room; it says how much was asked, is free, and is free in one
                piece. Nothing has changed.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        creation.check_keys(cache_keys)
        return creation.allocate(self._open(), cache_desc, cache_keys, paged=False)

    def allocate_blocks_cache(
        self, cache_desc: CacheDesc, blocks_cache_key: BlocksCacheKey | None = None
    ) -> Cache:
        """Make a blocks cache in new memory.

        Dimension 0 is the blocks. Otherwise as :meth:`allocate_cache`.

        Args:
            cache_desc: ``num_tensors`` tensors of ``shape``. Not changed, and usable for other
                caches.
            blocks_cache_key: What peers may call it, besides its id.

        Raises:
            LLMParamError: A shape that is no cache, or a key that is bound already.
            LLMOutOfMemoryError: No room.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        keys = creation.blocks_keys(blocks_cache_key)
        return creation.allocate(self._open(), cache_desc, keys, paged=True)

    def create_host_cache(self, cache_desc: CacheDesc) -> Cache:
        """Make a blocks cache in host memory for ``swap_blocks`` (not in the reference).

        The memory is pinned where there is an accelerator.

        Args:
            cache_desc: Its placement must be ``Placement.HOST``.

        Returns:
            A cache as :meth:`allocate_blocks_cache` makes it: from the host pool if one is
            configured, and known to the instance.

        Raises:
            LLMParamError: Another placement, or a shape that is no cache.
            LLMOutOfMemoryError: No room, or the memory could not be pinned.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc, allow_none=False)
        if cache_desc.placement != Placement.HOST:
            raise param_error(
                f"create_host_cache wants placement HOST, got {cache_desc.placement!s}"
            )
        return creation.allocate(self._open(), cache_desc, (), paged=True)

    def register_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[int] | list[torch.Tensor] | tuple[torch.Tensor, ...],
        cache_keys: Sequence[CacheKey] = (),
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Make a contiguous cache of the caller's memory (reference API, 9.1).

        May be called before or after linking.

        Args:
            cache_desc: What the memory is.
            addrs: One tensor, or one address, per tensor. Tensors are kept alive by the cache; they
                have ``shape``, and may be views whose rows are each contiguous. Memory given as
                addresses stays the caller's: keep it until :meth:`unregister_cache` has returned.
            cache_keys: As for :meth:`allocate_cache`; a pull does not consume them.
            remote_accessible: Whether peers may read and write it. None: yes, except host memory in
                remote-accessible mode.

        Raises:
            AttributeError: ``cache_desc`` is None.
            LLMParamError: Wrong count, an address that is 0 or not mapped, readable and writable
                over the whole tensor (with its index), tensors of other shape or dtype or that
                overlap, wrong keys.
        """
        creation.check_register_types(cache_desc, addrs, None)
        creation.check_keys(cache_keys)
        creation.check_register_types(cache_desc, addrs, remote_accessible)
        return creation.register(
            self._open(), cache_desc, addrs, cache_keys, remote_accessible, paged=False
        )

    def register_blocks_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[int] | list[torch.Tensor] | tuple[torch.Tensor, ...],
        blocks_cache_key: BlocksCacheKey | None = None,
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Make a blocks cache of the caller's memory. Otherwise as :meth:`register_cache`.

        Args:
            cache_desc: What the memory is. Not changed.
            addrs: One tensor, or one address, per tensor.
            blocks_cache_key: What peers may call it, besides its id.
            remote_accessible: As for :meth:`register_cache`.

        Raises:
            AttributeError: ``cache_desc`` is None.
            LLMParamError: As for :meth:`register_cache`.
        """
        creation.check_register_types(cache_desc, addrs, None)
        keys = creation.blocks_keys(blocks_cache_key)
        creation.check_register_types(cache_desc, addrs, remote_accessible)
        return creation.register(
            self._open(), cache_desc, addrs, keys, remote_accessible, paged=True
        )

    def deallocate_cache(self, cache: Cache) -> None:
        """Let go of an allocated contiguous cache.

        The handle refuses use from now on (reference API, 8.5). Does not block.

        The memory is freed when no key names a row of it any more, no transfer uses it, and the
        last tensor taken from it is gone. On a registered cache this does nothing; calling it again
        neither.

        Raises:
            LLMParamError: A blocks cache, or a cache of another instance.
        """
        creation.deallocate(self._open(LLMStatusCode.LLM_PARAM_INVALID), cache, paged=False)

    def deallocate_blocks_cache(self, cache: Cache) -> None:
        """Let go of an allocated blocks cache and its key.

        A transfer that uses it still ends well. Otherwise as :meth:`deallocate_cache`.

        Raises:
            LLMParamError: A contiguous cache, or a cache of another instance.
        """
        creation.deallocate(self._open(LLMStatusCode.LLM_PARAM_INVALID), cache, paged=True)

    def unregister_cache(self, cache_id: int, *, timeout: int | None = None) -> None:
        """Forget a registered cache.

        Waits for transfers that use it: then the memory is the caller's alone.

        Args:
            cache_id: Its id; an unknown one is ignored.
            timeout: Milliseconds to wait at most. None: ``sync_kv_timeout``.

        Raises:
            TypeError: ``cache_id`` or ``timeout`` is no int.
            ValueError: One of them is outside its width.
            LLMParamError: The cache is allocated, not registered; or ``timeout`` is not positive.
            LLMTimeoutError: A transfer still uses it; it stays registered.
        """
        creation.unregister(self._open(), cache_id, timeout)

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Unbind a key of an allocated cache, which may free it (reference API, 8.5).

        Unknown keys, and keys of registered caches, are left alone.
        """
        creation.remove_key(self._open(LLMStatusCode.LLM_PARAM_INVALID), cache_key)

    def remap_registered_memory(self, mem_infos: MemInfo | list[MemInfo]) -> None:
        """Check the arguments, and do nothing: registered memory is never mapped here in advance.

        In the reference this renews a device's mapping after a memory fault (reference API, 9.5).

        Args:
            mem_infos: Spans of device memory.

        Raises:
            LLMParamError: Whatever is wrong with ``mem_infos``, a wrong type too; an empty list.
            LLMNotLinkedError: No peer is linked.
        """
        instance = self._open(LLMStatusCode.LLM_PARAM_INVALID)
        remapping.check_mem_infos(mem_infos)
        remapping.check_linked(instance)
