# SPDX-License-Identifier: Apache-2.0
"""Argument checks of pulls and pushes, in the reference's order (9.3, 9.4); make a ``Transfer``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_datadist_torch import geometry, ops
from llm_datadist_torch.cache import Cache
from llm_datadist_torch.geometry import Layout
from llm_datadist_torch.operations import plans
from llm_datadist_torch.operations.transfers import Transfer
from llm_datadist_torch.transports.base import Direction
from llm_datadist_torch.values.checks import (
    check_int64,
    check_isinstance,
    check_layer_range,
    check_uint32,
    param_error,
)
from llm_datadist_torch.values.keys import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    check_cache_key,
)

Blocks = Sequence[int] | torch.Tensor


def pull_cache(
    cache_key: CacheKey | CacheKeyByIdAndIndex,
    cache: Cache,
    batch_index: int,
    size: int,
    src_layer_range: range | None,
    dst_layer_range: range | None,
    tensor_num_per_layer: int,
) -> Transfer:
    """Check the arguments of ``pull_cache``."""
    check_isinstance("cache_key", cache_key, (CacheKey, CacheKeyByIdAndIndex), allow_none=False)
    check_isinstance("cache", cache, Cache, allow_none=False)
    batch_index = check_uint32("batch_index", batch_index)
    size = check_int64("size", size)
    if cache.is_blocks_cache:
        raise param_error(
            "cache is a blocks cache, pull_cache is for contiguous ones", remedy="use pull_blocks."
        )
    if size != -1 and size <= 0:
        raise param_error(f"size={size} must be -1 or positive")
    tensor_num_per_layer = _checked_per_layer(tensor_num_per_layer)
    _check_key(cache_key)
    _check_pull_ranges(src_layer_range, dst_layer_range)

    def check_local(layout: Layout) -> None:
        geometry.check_row("batch_index", batch_index, layout)
        if size > layout.row_bytes:
            raise param_error(f"size={size} is more than a row of {layout.row_bytes} bytes")
        if dst_layer_range is not None or src_layer_range is not None:
            geometry.layer_tensors(
                "dst_layer_range", dst_layer_range, tensor_num_per_layer, layout.num_tensors
            )

    plan = plans.row_pull(batch_index, size, src_layer_range, dst_layer_range, tensor_num_per_layer)
    return Transfer("pull_cache", Direction.READ, cache_key, cache, False, check_local, plan)


def pull_blocks(
    src_cache_key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
    dst_cache: Cache,
    src_blocks: Blocks,
    dst_blocks: Blocks,
    src_layer_range: range | None,
    dst_layer_range: range | None,
    tensor_num_per_layer: int,
) -> Transfer:
    """Check the arguments of ``pull_blocks``."""
    kinds = (CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey)
    check_isinstance("src_cache_key", src_cache_key, kinds, allow_none=False)
    check_isinstance("dst_cache", dst_cache, Cache, allow_none=False)
    src_ids = ops.as_ids(src_blocks, "src_blocks")
    dst_ids = ops.as_ids(dst_blocks, "dst_blocks")
    _check_paged("dst_cache", dst_cache)
    _check_listed("dst_blocks", dst_ids)
    tensor_num_per_layer = _checked_per_layer(tensor_num_per_layer)
    paged = isinstance(src_cache_key, BlocksCacheKey)
    if paged:
        _check_listed("src_blocks", src_ids)
    else:
        if len(src_ids):
            raise param_error(
                "src_blocks must be empty with this key: a contiguous cache is cut in order",
                remedy="give a BlocksCacheKey to pull from a blocks cache.",
            )
        _check_key(src_cache_key)
    _check_pull_ranges(src_layer_range, dst_layer_range)

    def check_local(layout: Layout) -> None:
        if paged:
            _check_equal_lengths(src_ids, dst_ids)
        geometry.check_rows("dst_blocks", dst_ids, layout, unique=True)
        if dst_layer_range is not None or src_layer_range is not None:
            geometry.layer_tensors(
                "dst_layer_range", dst_layer_range, tensor_num_per_layer, layout.num_tensors
            )

    plan = plans.block_pull(
        src_ids if paged else None, dst_ids, src_layer_range, dst_layer_range, tensor_num_per_layer
    )
    return Transfer(
        "pull_blocks", Direction.READ, src_cache_key, dst_cache, paged, check_local, plan
    )


def push_cache(
    dst_cache_key: CacheKeyByIdAndIndex,
    src_cache: Cache,
    src_batch_index: int,
    src_layer_range: range | None,
    dst_layer_range: range | None,
    size: int,
    tensor_num_per_layer: int,
) -> Transfer:
    """Check the arguments of ``push_cache``."""
    check_isinstance("dst_cache_key", dst_cache_key, CacheKeyByIdAndIndex, allow_none=False)
    check_isinstance("src_cache", src_cache, Cache, allow_none=False)
    src_batch_index = check_uint32("src_batch_index", src_batch_index)
    if src_cache.is_blocks_cache:
        raise param_error(
            "src_cache is a blocks cache, push_cache is for contiguous ones",
            remedy="use push_blocks.",
        )
    tensor_num_per_layer = _checked_per_layer(tensor_num_per_layer)
    src, dst = _pushed(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
    size = check_int64("size", size)
    if size != -1:
        raise param_error(f"size={size}: push_cache moves whole rows, only -1 is supported")
    _check_key(dst_cache_key)

    def check_local(layout: Layout) -> None:
        geometry.check_row("src_batch_index", src_batch_index, layout)

    plan = plans.row_push(src_batch_index, src, dst)
    return Transfer(
        "push_cache", Direction.WRITE, dst_cache_key, src_cache, False, check_local, plan
    )


def push_blocks(
    dst_cache_key: BlocksCacheKey,
    src_cache: Cache,
    src_blocks: Blocks,
    dst_blocks: Blocks,
    src_layer_range: range | None,
    dst_layer_range: range | None,
    tensor_num_per_layer: int,
) -> Transfer:
    """Check the arguments of ``push_blocks``."""
    # None passes here, and is an AttributeError at its first use, as in the reference.
    check_isinstance("dst_cache_key", dst_cache_key, BlocksCacheKey)
    check_isinstance("src_cache", src_cache, Cache, allow_none=False)
    src_ids = ops.as_ids(src_blocks, "src_blocks")
    dst_ids = ops.as_ids(dst_blocks, "dst_blocks")
    _check_paged("src_cache", src_cache)
    _check_listed("dst_blocks", dst_ids)
    tensor_num_per_layer = _checked_per_layer(tensor_num_per_layer)
    src, dst = _pushed(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)

    def check_local(layout: Layout) -> None:
        _check_listed("src_blocks", src_ids)
        _check_equal_lengths(src_ids, dst_ids)
        geometry.check_rows("src_blocks", src_ids, layout)

    plan = plans.block_push(src_ids, dst_ids, src, dst)
    return Transfer(
        "push_blocks", Direction.WRITE, dst_cache_key, src_cache, True, check_local, plan
    )


def _checked_per_layer(tensor_num_per_layer: int) -> int:
    tensor_num_per_layer = check_uint32("tensor_num_per_layer", tensor_num_per_layer)
    if tensor_num_per_layer < 1:
        raise param_error(f"tensor_num_per_layer={tensor_num_per_layer} must be at least 1")
    return tensor_num_per_layer


def _check_key(key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey) -> None:
    if isinstance(key, CacheKey):
        check_cache_key(key)
    elif isinstance(key, CacheKeyByIdAndIndex) and key.cache_id < 0:
        raise param_error(f"cache_id={key.cache_id} names no cache; ids start at 1")


def _check_pull_ranges(src_layer_range: range | None, dst_layer_range: range | None) -> None:
    for name, layers in (
        ("src_layer_range", src_layer_range),
        ("dst_layer_range", dst_layer_range),
    ):
        check_layer_range(name, layers, allow_none=True, uint32_bounds=True)


def _pushed(
    cache: Cache, src_layer_range: range | None, dst_layer_range: range | None, per_layer: int
) -> tuple[range, range]:
    for name, layers in (
        ("src_layer_range", src_layer_range),
        ("dst_layer_range", dst_layer_range),
    ):
        check_layer_range(name, layers, allow_none=True)
    return geometry.pushed_tensors(
        cache.layout.num_tensors, src_layer_range, dst_layer_range, per_layer
    )


def _check_paged(name: str, cache: Cache) -> None:
    if not cache.is_blocks_cache:
        raise param_error(f"{name} is contiguous, a blocks cache is needed")


def _check_listed(name: str, ids: torch.Tensor) -> None:
    if not len(ids):
        raise param_error(f"{name} is empty")


def _check_equal_lengths(src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
    if len(src_ids) != len(dst_ids):
        raise param_error(f"{len(src_ids)} src_blocks for {len(dst_ids)} dst_blocks")
