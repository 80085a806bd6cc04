# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that several operations share."""

from __future__ import annotations

from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.values.checks import check_layer_range, check_uint32, param_error
from llm_datadist_torch.values.keys import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    check_cache_key,
)
from llm_datadist_torch.values.status import LLMException


def check_per_layer(tensor_num_per_layer: int) -> int:
    """Check ``tensor_num_per_layer``; returns it as an int.

    Raises:
        TypeError, ValueError: It is not a uint32.
        LLMParamError: It is 0.
    """
    tensor_num_per_layer = check_uint32("tensor_num_per_layer", tensor_num_per_layer)
    if tensor_num_per_layer < 1:
        raise param_error(f"tensor_num_per_layer={tensor_num_per_layer} must be at least 1")
    return tensor_num_per_layer


def check_key(key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey) -> None:
    """Check that a key names something.

    Raises:
        LLMParamError: It does not.
    """
    if isinstance(key, CacheKey):
        check_cache_key(key)
    elif isinstance(key, CacheKeyByIdAndIndex) and key.cache_id < 0:
        raise param_error(f"cache_id={key.cache_id} names no cache; ids start at 1")


def check_ranges(
    src_layer_range: range | None, dst_layer_range: range | None, *, uint32_bounds: bool
) -> None:
    """Check the types and bounds of layer ranges.

    Raises:
        TypeError, ValueError, LLMParamError: See :func:`check_layer_range`.
    """
    for name, layers in (
        ("src_layer_range", src_layer_range),
        ("dst_layer_range", dst_layer_range),
    ):
        check_layer_range(name, layers, allow_none=True, uint32_bounds=uint32_bounds)


def is_contiguous(name: str) -> LLMException:
    """The error for a contiguous cache where a blocks cache is needed."""
    return param_error(f"{name} is contiguous, a blocks cache is needed")


def is_empty(name: str) -> LLMException:
    """The error for an empty list of blocks."""
    return param_error(f"{name} is empty")


def other_length(num_src: int, num_dst: int) -> LLMException:
    """The error for block lists of different lengths."""
    return param_error(f"{num_src} src_blocks for {num_dst} dst_blocks")


def check_rows_first(*caches: Cache) -> None:
    """The unit of copies is dimension 0 (section 14, 18); all caches must have as many tensors."""
    for cache in caches:
        if cache.cache_desc.batch_dim != 0:
            raise param_error(
                f"batch_dim_index={cache.cache_desc.batch_dim}: only 0 can be copied or transferred"
            )
        if cache.layout.num_tensors != caches[0].layout.num_tensors:
            raise param_error(
                f"{caches[0].layout.num_tensors} source tensors for {cache.layout.num_tensors}"
                " destination tensors"
            )
