# SPDX-License-Identifier: Apache-2.0
"""``push_cache`` and ``push_blocks`` (reference API, 9.4). Checks are in the reference's order."""

from __future__ import annotations

import torch

from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.movement import arguments, geometry
from llm_datadist_torch.movement.remote import RemoteCache
from llm_datadist_torch.movement.transfer import Plan, Plans, Push
from llm_datadist_torch.values.checks import (
    Ids,
    as_ids,
    check_int64,
    check_isinstance,
    check_uint32,
    param_error,
)
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.layout import Layout


class PushCache(Push):
    """A whole row of ours into a row of a peer; see ``CacheManager.push_cache``."""

    operation = "push_cache"

    def __init__(
        self,
        instance: Instance,
        dst_cache_key: CacheKeyByIdAndIndex,
        src_cache: Cache,
        src_batch_index: int,
        src_layer_range: range | None,
        dst_layer_range: range | None,
        size: int,
        tensor_num_per_layer: int,
    ) -> None:
        check_isinstance("dst_cache_key", dst_cache_key, CacheKeyByIdAndIndex, allow_none=False)
        check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        self._row = check_uint32("src_batch_index", src_batch_index)
        if src_cache.is_blocks_cache:
            raise param_error(
                "src_cache is a blocks cache, push_cache is for contiguous ones",
                remedy="use push_blocks.",
            )
        self._src, self._dst = _tensors(
            src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer
        )
        size = check_int64("size", size)
        if size != -1:
            raise param_error(f"size={size}: push_cache moves whole rows, only -1 is supported")
        arguments.check_key(dst_cache_key)
        super().__init__(instance, dst_cache_key, src_cache, paged=False)

    def check_local(self, local: Layout) -> None:
        """See :meth:`Transfer.check_local`."""
        geometry.check_row("src_batch_index", self._row, local)

    def plan(self, local: Layout, remote: RemoteCache) -> Plans:
        """See :meth:`Transfer.plan`. The peer's row must have room for ours (section 14, 11)."""
        check_remote_tensors(self._dst, remote)
        runs = geometry.row_to_row(
            remote.layout, local, remote.view.row, self._row, local.row_bytes
        )
        return (Plan(self._src, self._dst, geometry.local_first(runs)),)


class PushBlocks(Push):
    """Blocks of ours into a peer's blocks; see ``CacheManager.push_blocks``."""

    operation = "push_blocks"

    def __init__(
        self,
        instance: Instance,
        dst_cache_key: BlocksCacheKey,
        src_cache: Cache,
        src_blocks: Ids,
        dst_blocks: Ids,
        src_layer_range: range | None,
        dst_layer_range: range | None,
        tensor_num_per_layer: int,
    ) -> None:
        # None passes here, and is an AttributeError at its first use, as in the reference.
        check_isinstance("dst_cache_key", dst_cache_key, BlocksCacheKey)
        check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        self._src_blocks = as_ids(src_blocks, "src_blocks")
        self._dst_blocks = as_ids(dst_blocks, "dst_blocks")
        if not src_cache.is_blocks_cache:
            raise arguments.is_contiguous("src_cache")
        if not len(self._dst_blocks):
            raise arguments.is_empty("dst_blocks")
        self._src, self._dst = _tensors(
            src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer
        )
        super().__init__(instance, dst_cache_key, src_cache, paged=True)

    def check_local(self, local: Layout) -> None:
        """See :meth:`Transfer.check_local`."""
        if not len(self._src_blocks):
            raise arguments.is_empty("src_blocks")
        if len(self._src_blocks) != len(self._dst_blocks):
            raise arguments.other_length(len(self._src_blocks), len(self._dst_blocks))
        geometry.check_rows("src_blocks", self._src_blocks, local)

    def _bytes_of(self, runs: torch.Tensor, local: Layout, remote: Layout) -> int:  # noqa: ARG002
        """See :meth:`Transfer._bytes_of`."""
        return len(self._dst_blocks) * local.row_bytes

    def plan(self, local: Layout, remote: RemoteCache) -> Plans:
        """See :meth:`Transfer.plan`."""
        check_remote_tensors(self._dst, remote)
        geometry.check_rows("dst_blocks", self._dst_blocks, remote.layout, unique=True)
        runs = geometry.blocks_to_blocks(remote.layout, local, self._dst_blocks, self._src_blocks)
        return (Plan(self._src, self._dst, geometry.local_first(runs)),)


def check_remote_tensors(dst: range, remote: RemoteCache) -> None:
    """Check that a push's destination tensors are in the peer's cache.

    Raises:
        LLMParamError: They are not.
    """
    if dst.stop > remote.layout.num_tensors:
        raise param_error(
            f"dst_layer_range ends at tensor {dst.stop}, but the peer's cache has"
            f" {remote.layout.num_tensors}"
        )


def _tensors(
    cache: Cache,
    src_layer_range: range | None,
    dst_layer_range: range | None,
    tensor_num_per_layer: int,
) -> tuple[range, range]:
    """The tensors that a push pairs, ours and the peer's."""
    per_layer = arguments.check_per_layer(tensor_num_per_layer)
    arguments.check_ranges(src_layer_range, dst_layer_range, uint32_bounds=False)
    return geometry.pushed_tensors(
        cache.layout.num_tensors, src_layer_range, dst_layer_range, per_layer
    )
