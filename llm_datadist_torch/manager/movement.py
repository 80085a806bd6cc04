# SPDX-License-Identifier: Apache-2.0
"""The public operations that move bytes: local copies, pulls and pushes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llm_datadist_torch.cache import Cache
from llm_datadist_torch.manager.base import ManagerBase
from llm_datadist_torch.operations import arguments, copies, transfers
from llm_datadist_torch.streams import Stream
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.status import LLMStatusCode

if TYPE_CHECKING:
    import torch


class CacheMovement(ManagerBase):
    """Copy, swap, pull, push."""

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
        copies.copy_cache(
            self._open(LLMStatusCode.LLM_PARAM_INVALID),
            dst,
            src,
            dst_batch_index,
            src_batch_index,
            offset,
            size,
            req_id,
            non_blocking=non_blocking,
        )

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
        copies.copy_blocks(
            self._open(LLMStatusCode.LLM_PARAM_INVALID),
            cache,
            copy_block_info,
            non_blocking=non_blocking,
        )

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
        copies.swap_blocks(
            self._open(LLMStatusCode.LLM_PARAM_INVALID),
            src_cache,
            dst_cache,
            src_to_dst,
            non_blocking=non_blocking,
        )

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
            timeout: Milliseconds that this call may take, linking a lost link anew included; None:
                ``sync_kv_timeout``. Not in the reference.

        Raises:
            LLMParamError: What does not fit, before a byte is written.
            LLMCacheNotFoundError: ``cache`` has ended; or the peer has no such cache, row or key.
            LLMNotLinkedError: The peer isn't linked; as ``LLMPeerLostError`` if it was lost and
                isn't back, or while we pull.
            LLMTimeoutError: Not done within ``timeout``. ``cache`` may be partly written,
                and is not written any more.
        """
        instance = self._open(LLMStatusCode.LLM_PARAM_INVALID)
        transfers.run(
            instance,
            arguments.pull_cache(
                cache_key,
                cache,
                batch_index,
                size,
                src_layer_range,
                dst_layer_range,
                tensor_num_per_layer,
            ),
            wait_stream,
            timeout,
        )

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
        instance = self._open(LLMStatusCode.LLM_PARAM_INVALID)
        transfers.run(
            instance,
            arguments.pull_blocks(
                src_cache_key,
                dst_cache,
                src_blocks,
                dst_blocks,
                src_layer_range,
                dst_layer_range,
                tensor_num_per_layer,
            ),
            wait_stream,
            timeout,
        )

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
        instance = self._open(LLMStatusCode.LLM_PARAM_INVALID)
        transfers.run(
            instance,
            arguments.push_cache(
                dst_cache_key,
                src_cache,
                src_batch_index,
                src_layer_range,
                dst_layer_range,
                size,
                tensor_num_per_layer,
            ),
            wait_stream,
            timeout,
        )

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
        instance = self._open(LLMStatusCode.LLM_PARAM_INVALID)
        transfers.run(
            instance,
            arguments.push_blocks(
                dst_cache_key,
                src_cache,
                src_blocks,
                dst_blocks,
                src_layer_range,
                dst_layer_range,
                tensor_num_per_layer,
            ),
            wait_stream,
            timeout,
        )
