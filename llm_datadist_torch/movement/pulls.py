# SPDX-License-Identifier: Apache-2.0
"""``pull_cache`` and ``pull_blocks`` (reference API, 9.3). Checks are in the reference's order."""

from __future__ import annotations

import torch

from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.movement import arguments, geometry
from llm_datadist_torch.movement.remote import RemoteCache
from llm_datadist_torch.movement.transfer import Plan, Plans, Pull
from llm_datadist_torch.values.checks import (
    Ids,
    as_ids,
    check_int64,
    check_isinstance,
    check_uint32,
    param_error,
)
from llm_datadist_torch.values.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.values.layout import Layout

_KEYS = (CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey)


class PullCache(Pull):
    """The first bytes of a peer's row into a row of ours; see ``CacheManager.pull_cache``."""

    operation = "pull_cache"

    def __init__(
        self,
        instance: Instance,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        cache: Cache,
        batch_index: int,
        size: int,
        src_layer_range: range | None,
        dst_layer_range: range | None,
        tensor_num_per_layer: int,
    ) -> None:
        check_isinstance("cache_key", cache_key, (CacheKey, CacheKeyByIdAndIndex), allow_none=False)
        check_isinstance("cache", cache, Cache, allow_none=False)
        self._row = check_uint32("batch_index", batch_index)
        self._size = check_int64("size", size)
        if cache.is_blocks_cache:
            raise param_error(
                "cache is a blocks cache, pull_cache is for contiguous ones",
                remedy="use pull_blocks.",
            )
        if size != -1 and size <= 0:
            raise param_error(f"size={size} must be -1 or positive")
        self._per_layer = arguments.check_per_layer(tensor_num_per_layer)
        arguments.check_key(cache_key)
        arguments.check_ranges(src_layer_range, dst_layer_range, uint32_bounds=True)
        self._src_layers, self._dst_layers = src_layer_range, dst_layer_range
        super().__init__(instance, cache_key, cache, paged=False)

    def check_local(self, local: Layout) -> None:
        """See :meth:`Transfer.check_local`."""
        geometry.check_row("batch_index", self._row, local)
        if self._size > local.row_bytes:
            raise param_error(f"size={self._size} is more than a row of {local.row_bytes} bytes")
        if self._dst_layers is not None or self._src_layers is not None:
            geometry.layer_tensors(
                "dst_layer_range", self._dst_layers, self._per_layer, local.num_tensors
            )

    def plan(self, local: Layout, remote: RemoteCache) -> Plans:
        """See :meth:`Transfer.plan`."""
        dst, src = geometry.pulled_tensors(
            local.num_tensors,
            remote.layout.num_tensors,
            self._dst_layers,
            self._src_layers,
            self._per_layer,
        )
        nbytes = local.row_bytes if self._size == -1 else self._size
        runs = geometry.row_to_row(local, remote.layout, self._row, remote.view.row, nbytes)
        return (Plan(dst, src, runs),)


class PullBlocks(Pull):
    """A peer's blocks, or its row, into blocks of ours; see ``CacheManager.pull_blocks``."""

    operation = "pull_blocks"

    def __init__(
        self,
        instance: Instance,
        src_cache_key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
        dst_cache: Cache,
        src_blocks: Ids,
        dst_blocks: Ids,
        src_layer_range: range | None,
        dst_layer_range: range | None,
        tensor_num_per_layer: int,
    ) -> None:
        check_isinstance("src_cache_key", src_cache_key, _KEYS, allow_none=False)
        check_isinstance("dst_cache", dst_cache, Cache, allow_none=False)
        self._src_blocks = as_ids(src_blocks, "src_blocks")
        self._dst_blocks = as_ids(dst_blocks, "dst_blocks")
        if not dst_cache.is_blocks_cache:
            raise arguments.is_contiguous("dst_cache")
        if not len(self._dst_blocks):
            raise arguments.is_empty("dst_blocks")
        # A number that is plainly right needs no call on this, the shortest way.
        if type(tensor_num_per_layer) is not int or not 0 < tensor_num_per_layer < 1 << 32:
            tensor_num_per_layer = arguments.check_per_layer(tensor_num_per_layer)
        self._per_layer = tensor_num_per_layer
        self._from_blocks = isinstance(src_cache_key, BlocksCacheKey)
        if self._from_blocks:
            if not len(self._src_blocks):
                raise arguments.is_empty("src_blocks")
        else:
            if len(self._src_blocks):
                raise param_error(
                    "src_blocks must be empty with this key: a contiguous cache is cut in order",
                    remedy="give a BlocksCacheKey to pull from a blocks cache.",
                )
            arguments.check_key(src_cache_key)
        self._by_layer = src_layer_range is not None or dst_layer_range is not None
        if self._by_layer:
            arguments.check_ranges(src_layer_range, dst_layer_range, uint32_bounds=True)
        self._src_layers, self._dst_layers = src_layer_range, dst_layer_range
        super().__init__(instance, src_cache_key, dst_cache, self._from_blocks)

    def check_local(self, local: Layout) -> None:
        """See :meth:`Transfer.check_local`."""
        if self._from_blocks and len(self._src_blocks) != len(self._dst_blocks):
            raise arguments.other_length(len(self._src_blocks), len(self._dst_blocks))
        geometry.check_rows("dst_blocks", self._dst_blocks, local, unique=True)
        if self._by_layer:
            geometry.layer_tensors(
                "dst_layer_range", self._dst_layers, self._per_layer, local.num_tensors
            )

    def plan(self, local: Layout, remote: RemoteCache) -> Plans:
        """See :meth:`Transfer.plan`."""
        dst, src = geometry.pulled_tensors(
            local.num_tensors,
            remote.layout.num_tensors,
            self._dst_layers,
            self._src_layers,
            self._per_layer,
        )
        if self._from_blocks:
            geometry.check_rows("src_blocks", self._src_blocks, remote.layout)
            runs = geometry.blocks_to_blocks(
                local, remote.layout, self._dst_blocks, self._src_blocks
            )
        else:
            runs = geometry.row_to_blocks(local, remote.layout, self._dst_blocks, remote.view.row)
        return (Plan(dst, src, runs),)

    def _bytes_of(self, runs: torch.Tensor, local: Layout, remote: Layout) -> int:
        """See :meth:`Transfer._bytes_of`."""
        if self._from_blocks:
            return len(self._dst_blocks) * local.row_bytes
        return super()._bytes_of(runs, local, remote)
