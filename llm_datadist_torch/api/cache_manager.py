# SPDX-License-Identifier: Apache-2.0
"""``CacheManager``: all public operations on the caches of one instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm_datadist_torch.api import creation, remapping
from llm_datadist_torch.api.forms import same_parameters
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.links.work import CacheTask
from llm_datadist_torch.memory.streams import Stream
from llm_datadist_torch.movement.copies import CopyBlocks, CopyCache, SwapBlocks
from llm_datadist_torch.movement.layerwise import Layerwise
from llm_datadist_torch.movement.pulls import PullBlocks, PullCache
from llm_datadist_torch.movement.pushes import PushBlocks, PushCache
from llm_datadist_torch.movement.transfer import Transfer
from llm_datadist_torch.values.cache_desc import CacheDesc
from llm_datadist_torch.values.checks import check_isinstance, param_error
from llm_datadist_torch.values.enums import Placement
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.mem_info import MemInfo
from llm_datadist_torch.values.status import LLMStatusCode, error_for
from llm_datadist_torch.values.transfer import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

if TYPE_CHECKING:
    import torch


class CacheManager:
    """Caches of one instance: ``LLMDataDist.cache_manager``.

    A call whose name ends in ``_async`` returns a ``CacheTask`` at once. Every other call blocks
    until its work is done: on return the data has landed. Only a layer synchronizer waits for the
    caller's own compute; otherwise make source data complete first. Ids may be lists, tuples or 1-D
    int64 tensors (which cost less).

    Every method raises TypeError for an argument of a wrong type, ValueError for an int outside its
    C width, and an ``LLMException`` after the instance has been finalized.

    Thread safety: all methods may be called from any thread; transfers on one link run side by
    side. Two operations that write the same bytes at once are a data race, as with any tensor.
    """

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    def _open(self, closed: LLMStatusCode = LLMStatusCode.LLM_FAILED) -> Instance:
        """The instance, unless it has been finalized (reference API, 6.4, names the codes)."""
        if not self._instance.open:
            raise error_for(
                closed,
                "the instance has been finalized, or this is a forked child of its process",
                remedy="call init() in the process that uses it.",
            )
        return self._instance

    # -- caches -----------------------------------------------------------------------------------

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
            LLMParamError: A shape that fits no cache, too many keys, a key that is given twice or
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
            LLMParamError: A shape that fits no cache, or a key that is bound already.
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
            LLMParamError: Another placement, or a shape that fits no cache.
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
        """End an allocated contiguous cache.

        The handle refuses use from now on (reference API, 8.5). Does not block.

        The memory is freed when no key names a row of it any more, no transfer uses it, and the
        last tensor taken from it is gone. On a registered cache this does nothing; calling it again
        neither.

        Raises:
            LLMParamError: A blocks cache, or a cache of another instance.
        """
        creation.deallocate(self._open(LLMStatusCode.LLM_PARAM_INVALID), cache, paged=False)

    def deallocate_blocks_cache(self, cache: Cache) -> None:
        """End an allocated blocks cache and its key.

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
            TypeError: ``cache_id`` or ``timeout`` is not an int.
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

    # -- local copies -----------------------------------------------------------------------------

    def copy_cache(
        self,
        dst: Cache,
        src: Cache,
        dst_batch_index: int = 0,
        src_batch_index: int = 0,
        offset: int = 0,
        size: int = -1,
        req_id: int | None = None,
        *,
        non_blocking: bool = False,
    ) -> None:
        """Copy part of a row in every tensor.

        ``dst[dst_batch_index][offset:offset+size] = src[src_batch_index][...]`` (reference API,
        9.2).

        Args:
            dst: Contiguous cache written, in any placement.
            src: Contiguous cache read; dtype and shape may differ.
            dst_batch_index: Row written.
            src_batch_index: Row read.
            offset: Bytes from the start of both rows.
            size: Bytes per tensor; -1 for the rest of the source row.
            req_id: Only checked.
            non_blocking: Leave the copies on the device's current stream: they come after what is
                on it now, and before what is launched on it later. The memory is kept until they
                are done. Not in the reference.

        Raises:
            LLMParamError: A blocks cache, other number of tensors, rows or bytes out of range.
            LLMCacheNotFoundError: A cache has ended or belongs to another instance.
        """
        CopyCache(
            self._open(LLMStatusCode.LLM_PARAM_INVALID),
            dst,
            src,
            dst_batch_index,
            src_batch_index,
            offset,
            size,
            req_id,
        ).run(non_blocking=non_blocking)

    def copy_blocks(
        self,
        cache: Cache,
        copy_block_info: Mapping[int, list[int]] | torch.Tensor,
        *,
        non_blocking: bool = False,
    ) -> None:
        """Copy whole blocks within a cache, in every tensor (reference API, 9.2).

        All copies happen as if at once: every destination gets what its source held before the
        call, also in chains and cycles.

        Args:
            cache: Blocks cache.
            copy_block_info: Source block -> list of destination blocks; or an int64 tensor [n, 2]
                of (source, destination).
            non_blocking: As for :meth:`copy_cache`.

        Raises:
            LLMParamError: A contiguous cache, a block out of range, a destination named twice; no
                byte has moved then.
            LLMCacheNotFoundError: The cache has ended or belongs to another instance.
        """
        CopyBlocks(
            self._open(LLMStatusCode.LLM_PARAM_INVALID),
            cache,
            copy_block_info,
        ).run(non_blocking=non_blocking)

    def swap_blocks(
        self,
        src_cache: Cache,
        dst_cache: Cache,
        src_to_dst: Mapping[int, int] | torch.Tensor,
        *,
        non_blocking: bool = False,
    ) -> None:
        """Copy whole blocks from a HOST cache to a DEVICE cache or back, in every tensor.

        One way, no exchange (reference API, 9.2).

        Args:
            src_cache: Blocks cache read, allocated, registered or from ``Cache.create_cpu_cache``.
            dst_cache: Blocks cache written, in the other placement, with as many tensors and blocks
                of the same size.
            src_to_dst: Source block -> destination block; or an int64 tensor [n, 2].
            non_blocking: As for :meth:`copy_cache`. Host memory that isn't page-locked is copied
                before the return nevertheless.

        Raises:
            AttributeError: A cache or the mapping is None.
            LLMParamError: A contiguous or ended cache, equal placements, other block size, a block
                out of range, a destination named twice; no byte has moved then.
        """
        SwapBlocks(
            self._open(LLMStatusCode.LLM_PARAM_INVALID),
            src_cache,
            dst_cache,
            src_to_dst,
        ).run(non_blocking=non_blocking)

    # -- transfers --------------------------------------------------------------------------------

    def pull_cache(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        cache: Cache,
        batch_index: int = 0,
        size: int = -1,
        *,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        tensor_num_per_layer: int = 2,
        wait_stream: Stream | None = None,
        timeout: int | None = None,
    ) -> None:
        """Pull the beginning of a row of a peer's contiguous cache (reference API, 9.3).

        In two-sided mode the pulled request key is consumed at the owner, once all of its tensors
        have been pulled.

        Args:
            cache_key: The peer's row.
            cache: Contiguous cache written.
            batch_index: Row written.
            size: Bytes per tensor; -1 for a whole row of ``cache``. The peer's row must have as
                many.
            src_layer_range: Layers of the peer's cache; None for all.
            dst_layer_range: Layers of ``cache``; None for all.
            tensor_num_per_layer: Tensors of a layer; matters only with a layer range.
            wait_stream: No byte moves before what is on this stream now is done. None: the calling
                thread's current stream of the cache's device or, for host memory, of the NPU in
                use; ``torch.cpu.current_stream()`` waits for nothing. Not in the reference.
            timeout: Milliseconds that this call may take, relinking a lost link included; None:
                ``sync_kv_timeout``. Not in the reference.

        Raises:
            LLMParamError: What does not fit, before a byte is written.
            LLMCacheNotFoundError: ``cache`` has ended; or the peer has no such cache, row or key.
            LLMNotLinkedError: The peer isn't linked; as ``LLMPeerLostError`` if it was lost and
                isn't back, or while we pull.
            LLMTimeoutError: Not done within ``timeout``. ``cache`` may be partly written,
                and is not written any more.
        """
        PullCache(
            self._open(LLMStatusCode.LLM_PARAM_INVALID),
            cache_key,
            cache,
            batch_index,
            size,
            src_layer_range,
            dst_layer_range,
            tensor_num_per_layer,
        ).run(wait_stream, timeout)

    def pull_blocks(
        self,
        src_cache_key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
        dst_cache: Cache,
        src_blocks: Sequence[int] | torch.Tensor = (),
        dst_blocks: Sequence[int] | torch.Tensor = (),
        *,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        tensor_num_per_layer: int = 2,
        wait_stream: Stream | None = None,
        timeout: int | None = None,
    ) -> None:
        """Pull blocks of a peer's cache into blocks of ours (reference API, 9.3).

        With a ``BlocksCacheKey``: block ``dst_blocks[k]`` gets the peer's block ``src_blocks[k]``.
        With another key, a row of a contiguous cache is cut into ``dst_blocks`` in order; of a row
        that is no whole number of blocks, the last block gets what is left, its rest stays as it
        is.

        Args:
            src_cache_key: The peer's blocks cache, or a row of its contiguous cache.
            dst_cache: Blocks cache written.
            src_blocks: Blocks read; empty for a contiguous source.
            dst_blocks: Blocks written, each once.
            src_layer_range: Layers of the peer's cache; None for all.
            dst_layer_range: Layers of ``dst_cache``; None for all.
            tensor_num_per_layer: Tensors of a layer; matters only with a layer range.
            wait_stream: As for :meth:`pull_cache`.
            timeout: As for :meth:`pull_cache`.

        Raises:
            LLMParamError: What does not fit, before a byte is written.
            LLMCacheNotFoundError: ``dst_cache`` has ended; or the peer has no such cache, row or
                key.
            LLMNotLinkedError: As for :meth:`pull_cache`.
            LLMTimeoutError: As for :meth:`pull_cache`.
        """
        PullBlocks(
            self._open(LLMStatusCode.LLM_PARAM_INVALID),
            src_cache_key,
            dst_cache,
            src_blocks,
            dst_blocks,
            src_layer_range,
            dst_layer_range,
            tensor_num_per_layer,
        ).run(wait_stream, timeout)

    def push_cache(
        self,
        dst_cache_key: CacheKeyByIdAndIndex,
        src_cache: Cache,
        src_batch_index: int = 0,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        size: int = -1,
        tensor_num_per_layer: int = 2,
        *,
        wait_stream: Stream | None = None,
        timeout: int | None = None,
    ) -> None:
        """Push a whole row of a contiguous cache into a row of a peer's (reference API, 9.4).

        Works in both modes.

        Args:
            dst_cache_key: The peer's row; it must have room for ours.
            src_cache: Contiguous cache read.
            src_batch_index: Row read.
            src_layer_range: Layers read; None for all.
            dst_layer_range: The peer's layers; None for as many as ``src_cache`` has.
            size: Only -1.
            tensor_num_per_layer: Tensors of a layer; ``src_cache`` must be a whole number of
                layers.
            wait_stream: As for :meth:`pull_cache`.
            timeout: As for :meth:`pull_cache`.

        Raises:
            LLMParamError: What does not fit, before a byte is written.
            LLMCacheNotFoundError: ``src_cache`` has ended; or the peer has no such cache or row.
            LLMNotLinkedError: As for :meth:`pull_cache`.
            LLMTimeoutError: Not done within ``timeout``. The peer's row may be partly
                written.
        """
        PushCache(
            self._open(LLMStatusCode.LLM_PARAM_INVALID),
            dst_cache_key,
            src_cache,
            src_batch_index,
            src_layer_range,
            dst_layer_range,
            size,
            tensor_num_per_layer,
        ).run(wait_stream, timeout)

    def push_blocks(
        self,
        dst_cache_key: BlocksCacheKey,
        src_cache: Cache,
        src_blocks: Sequence[int] | torch.Tensor = (),
        dst_blocks: Sequence[int] | torch.Tensor = (),
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        tensor_num_per_layer: int = 2,
        *,
        wait_stream: Stream | None = None,
        timeout: int | None = None,
    ) -> None:
        """Push blocks of ours into blocks of a peer's cache (reference API, 9.4).

        Works in both modes.

        Args:
            dst_cache_key: The peer's blocks cache.
            src_cache: Blocks cache read.
            src_blocks: Blocks read.
            dst_blocks: The peer's blocks written, each once.
            src_layer_range: Layers read; None for all.
            dst_layer_range: The peer's layers; None for as many as ``src_cache`` has.
            tensor_num_per_layer: Tensors of a layer; ``src_cache`` must be a whole number of
                layers.
            wait_stream: As for :meth:`pull_cache`.
            timeout: As for :meth:`pull_cache`.

        Raises:
            AttributeError: ``dst_cache_key`` is None.
            LLMParamError: What does not fit, before a byte is written.
            LLMCacheNotFoundError: ``src_cache`` has ended; or the peer has no such cache.
            LLMNotLinkedError: As for :meth:`pull_cache`.
            LLMTimeoutError: Not done within ``timeout``. The peer's blocks may be partly
                written.
        """
        PushBlocks(
            self._open(LLMStatusCode.LLM_PARAM_INVALID),
            dst_cache_key,
            src_cache,
            src_blocks,
            dst_blocks,
            src_layer_range,
            dst_layer_range,
            tensor_num_per_layer,
        ).run(wait_stream, timeout)

    # -- in the background ------------------------------------------------------------------------

    def transfer_cache_async(
        self,
        src_cache: Cache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[TransferConfig | TransferWithCacheKeyConfig],
        src_block_indices: Sequence[int] | torch.Tensor | None = None,
        dst_block_indices: Sequence[int] | torch.Tensor | None = None,
        dst_block_memory_size: int | None = None,
        *,
        timeout: int | None = None,
    ) -> CacheTask:
        """Send layers of a cache to peers in the background, each as soon as it is ready.

        A layer is two tensors. For each layer that some config wants, in ascending order, the
        synchronizer is asked once, then the layer goes to these configs in list order. What moves
        in each of the two tensors (reference API, 10.3; S: bytes of a row or block of the source):

        - without indices: row ``src_batch_index``, S bytes, to the peer's row or address;
        - with destination indices: the row cut into the blocks ``dst_block_indices``, in order; the
          last one gets what is left of the row;
        - with both: block ``src_block_indices[k]`` to the peer's block ``dst_block_indices[k]``.

        The configs are independent: one that fails doesn't stop the others. If the synchronizer
        says False, those that want the layer fail with ``LLM_PARAM_INVALID``. If it raises, they
        fail with that error's status or ``LLM_UNKNOWN_ERROR``, and the task ends. The source keeps
        its memory until the task is done, also if it is deallocated. At most 32 tasks of an
        instance run at a time, others queue. Works in both modes, with both kinds of config.

        Args:
            src_cache: Cache in device memory, with an even number of tensors.
            layer_synchronizer: Called from another thread, as ``synchronize_layer(layer, None)``.
            transfer_configs: Where to send. Addresses must lie in caches that the peer lets others
                write to, at a row's or block's beginning or inside; what is sent must fit there.
            src_block_indices: Blocks of the source. Of a blocks cache without indices all blocks
                are sent, to blocks of the same numbers.
            dst_block_indices: Blocks at the peer, each once; counted from the address if given so.
            dst_block_memory_size: Bytes of a block at the peer, required with only
                ``dst_block_indices``; with both, None, 0 or S.
            timeout: Milliseconds for each layer, as for ``pull_cache``. Not in the reference.

        Returns:
            The task, with one result per config: ``LLM_KV_CACHE_NOT_EXIST`` (the source has ended,
            the peer has no such cache), ``LLM_PARAM_INVALID`` (it does not fit),
            ``LLM_NOT_YET_LINK``, ``LLM_TIMEOUT``...

        Raises:
            TypeError: Wrong types; a config whose key or layer range was set to None.
            ValueError: Indices or size outside uint64, ``timeout`` outside int32.
            LLMParamError: Arguments that contradict each other, or a blocks cache without indices.
            LLMException: LLM_FAILED: the instance is being finalized.
        """
        return Layerwise(
            self._open(LLMStatusCode.LLM_PARAM_INVALID),
            src_cache,
            layer_synchronizer,
            transfer_configs,
            src_block_indices,
            dst_block_indices,
            dst_block_memory_size,
        ).start(timeout)

    @same_parameters(pull_cache)
    def pull_cache_async(self, given: dict[str, Any]) -> CacheTask:
        """``pull_cache`` in the background. Not in the reference.

        The arguments' types and values are checked at once, as by ``pull_cache``; the task reports
        everything else. At most 8 pulls and pushes of an instance run at a time, in no order. The
        cache keeps its memory until the task is done. Lists and tensors of blocks may be changed
        after the call; a cache that is read may not be written before the task is done.

        Args: As for ``pull_cache``. What is on ``wait_stream`` at the call is waited for by the
        task, and ``timeout`` counts from when the transfer begins to run.

        Returns:
            The task, with one result.

        Raises:
            TypeError: Wrong types.
            ValueError: An int outside its width.
            LLMParamError: What ``pull_cache`` finds wrong with the arguments alone.
            LLMException: LLM_FAILED: the instance is being finalized.
        """
        return self._start(PullCache, given)

    @same_parameters(pull_blocks)
    def pull_blocks_async(self, given: dict[str, Any]) -> CacheTask:
        """``pull_blocks`` in the background, as :meth:`pull_cache_async`. Not in the reference.

        Returns:
            The task, with one result.

        Raises:
            TypeError, ValueError, LLMException: As :meth:`pull_cache_async`.
        """
        return self._start(PullBlocks, given)

    @same_parameters(push_cache)
    def push_cache_async(self, given: dict[str, Any]) -> CacheTask:
        """``push_cache`` in the background, as :meth:`pull_cache_async`. Not in the reference.

        Returns:
            The task, with one result.

        Raises:
            TypeError, ValueError, LLMException: As :meth:`pull_cache_async`.
        """
        return self._start(PushCache, given)

    @same_parameters(push_blocks)
    def push_blocks_async(self, given: dict[str, Any]) -> CacheTask:
        """``push_blocks`` in the background, as :meth:`pull_cache_async`. Not in the reference.

        Returns:
            The task, with one result.

        Raises:
            AttributeError: ``dst_cache_key`` is None.
            TypeError, ValueError, LLMException: As :meth:`pull_cache_async`.
        """
        return self._start(PushBlocks, given)

    def _start(self, operation: Callable[..., Transfer], given: dict[str, Any]) -> CacheTask:
        wait_stream, timeout = given.pop("wait_stream"), given.pop("timeout")
        transfer = operation(self._open(LLMStatusCode.LLM_PARAM_INVALID), **given)
        return transfer.start(wait_stream, timeout)
