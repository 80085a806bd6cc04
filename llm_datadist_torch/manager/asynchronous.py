# SPDX-License-Identifier: Apache-2.0
"""The public operations that run in the background, and return a ``CacheTask``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_datadist_torch.cache import Cache
from llm_datadist_torch.manager.base import ManagerBase
from llm_datadist_torch.operations import arguments, layerwise, layerwise_arguments
from llm_datadist_torch.streams import Stream
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.status import LLMStatusCode
from llm_datadist_torch.values.transfer import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist_torch.work import CacheTask

if TYPE_CHECKING:
    import torch


class AsynchronousMovement(ManagerBase):
    """Layer by layer transfers, and the ``*_async`` forms of pulls and pushes."""

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
            src_block_indices: Blocks of the source, required where it is a blocks cache.
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
        instance = self._open(LLMStatusCode.LLM_PARAM_INVALID)
        call = layerwise_arguments.transfer_cache_async(
            src_cache,
            layer_synchronizer,
            transfer_configs,
            src_block_indices,
            dst_block_indices,
            dst_block_memory_size,
        )
        return layerwise.start(instance, call, timeout)

    def pull_cache_async(
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
    ) -> CacheTask:
        """``pull_cache`` in the background. Not in the reference.

        The arguments' types and values are checked at once, as by ``pull_cache``; the task reports
        everything else. ``timeout`` counts from when the transfer begins to run; at most 8
        pulls and pushes of an instance do at a time, those on one link one after the other. The
        cache keeps its memory until the task is done.

        Args:
            cache_key: As for ``pull_cache``; so are the others.
            cache: Contiguous cache written.
            batch_index: Row written.
            size: Bytes per tensor; -1 for a row of ``cache``.
            src_layer_range: Layers of the peer's cache; None for all.
            dst_layer_range: Layers of ``cache``; None for all.
            tensor_num_per_layer: Tensors of a layer.
            wait_stream: As for ``pull_cache``; what is on it at the call is waited for by the task.
            timeout: As for ``pull_cache``, from when the transfer begins to run.

        Returns:
            The task, with one result.

        Raises:
            TypeError: Wrong types.
            ValueError: An int outside its width.
            LLMParamError: What ``pull_cache`` finds wrong with the arguments alone.
            LLMException: LLM_FAILED: the instance is being finalized.
        """
        instance = self._open(LLMStatusCode.LLM_PARAM_INVALID)
        transfer = arguments.pull_cache(
            cache_key,
            cache,
            batch_index,
            size,
            src_layer_range,
            dst_layer_range,
            tensor_num_per_layer,
        )
        return layerwise.start_one(instance, transfer, wait_stream, timeout)

    def pull_blocks_async(
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
    ) -> CacheTask:
        """``pull_blocks`` in the background; see :meth:`pull_cache_async`. Not in the reference.

        Args:
            src_cache_key: As for ``pull_blocks``; so are the others.
            dst_cache: Blocks cache written.
            src_blocks: Blocks read; empty for a contiguous source. May be changed after the call.
            dst_blocks: Blocks written, each once. May be changed after the call.
            src_layer_range: Layers of the peer's cache; None for all.
            dst_layer_range: Layers of ``dst_cache``; None for all.
            tensor_num_per_layer: Tensors of a layer.
            wait_stream: As for ``pull_cache``; what is on it at the call is waited for by the task.
            timeout: As for ``pull_cache``, from when the transfer begins to run.

        Returns:
            The task, with one result.

        Raises:
            TypeError: Wrong types.
            ValueError: An int outside its width.
            LLMParamError: What ``pull_blocks`` finds wrong with the arguments alone.
            LLMException: LLM_FAILED: the instance is being finalized.
        """
        instance = self._open(LLMStatusCode.LLM_PARAM_INVALID)
        transfer = arguments.pull_blocks(
            src_cache_key,
            dst_cache,
            src_blocks,
            dst_blocks,
            src_layer_range,
            dst_layer_range,
            tensor_num_per_layer,
        )
        return layerwise.start_one(instance, transfer, wait_stream, timeout)

    def push_cache_async(
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
    ) -> CacheTask:
        """``push_cache`` in the background; see :meth:`pull_cache_async`. Not in the reference.

        Args:
            dst_cache_key: As for ``push_cache``; so are the others.
            src_cache: Contiguous cache read; not to be written until the task is done.
            src_batch_index: Row read.
            src_layer_range: Layers read; None for all.
            dst_layer_range: The peer's layers; None for as many as ``src_cache`` has.
            size: Only -1.
            tensor_num_per_layer: Tensors of a layer.
            wait_stream: As for ``pull_cache``; what is on it at the call is waited for by the task.
            timeout: As for ``pull_cache``, from when the transfer begins to run.

        Returns:
            The task, with one result.

        Raises:
            TypeError: Wrong types.
            ValueError: An int outside its width.
            LLMParamError: What ``push_cache`` finds wrong with the arguments alone.
            LLMException: LLM_FAILED: the instance is being finalized.
        """
        instance = self._open(LLMStatusCode.LLM_PARAM_INVALID)
        transfer = arguments.push_cache(
            dst_cache_key,
            src_cache,
            src_batch_index,
            src_layer_range,
            dst_layer_range,
            size,
            tensor_num_per_layer,
        )
        return layerwise.start_one(instance, transfer, wait_stream, timeout)

    def push_blocks_async(
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
    ) -> CacheTask:
        """``push_blocks`` in the background; see :meth:`pull_cache_async`. Not in the reference.

        Args:
            dst_cache_key: As for ``push_blocks``; so are the others.
            src_cache: Blocks cache read; not to be written until the task is done.
            src_blocks: Blocks read. May be changed after the call.
            dst_blocks: The peer's blocks written, each once. May be changed after the call.
            src_layer_range: Layers read; None for all.
            dst_layer_range: The peer's layers; None for as many as ``src_cache`` has.
            tensor_num_per_layer: Tensors of a layer.
            wait_stream: As for ``pull_cache``; what is on it at the call is waited for by the task.
            timeout: As for ``pull_cache``, from when the transfer begins to run.

        Returns:
            The task, with one result.

        Raises:
            AttributeError: ``dst_cache_key`` is None.
            TypeError: Wrong types.
            ValueError: An int outside its width.
            LLMParamError: What ``push_blocks`` finds wrong with the arguments alone.
            LLMException: LLM_FAILED: the instance is being finalized.
        """
        instance = self._open(LLMStatusCode.LLM_PARAM_INVALID)
        transfer = arguments.push_blocks(
            dst_cache_key,
            src_cache,
            src_blocks,
            dst_blocks,
            src_layer_range,
            dst_layer_range,
            tensor_num_per_layer,
        )
        return layerwise.start_one(instance, transfer, wait_stream, timeout)
