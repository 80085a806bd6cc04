# SPDX-License-Identifier: Apache-2.0
"""Local copies: within a cache, between caches, between host and device (reference API, 9.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.caches.cache import Cache
from llm_datadist_torch.links.instance import Instance
from llm_datadist_torch.memory import streams
from llm_datadist_torch.memory.address import check_alive
from llm_datadist_torch.movement import arguments, ops
from llm_datadist_torch.values.checks import (
    as_ids,
    check_int64,
    check_isinstance,
    check_uint32,
    check_uint64,
    param_error,
)
from llm_datadist_torch.values.enums import Placement
from llm_datadist_torch.values.status import LLMException


class CopyCache:
    """Part of one row, in every tensor; see ``CacheManager.copy_cache``."""

    def __init__(
        self,
        instance: Instance,
        dst: Cache,
        src: Cache,
        dst_batch_index: int,
        src_batch_index: int,
        offset: int,
        size: int,
        req_id: int | None,
    ) -> None:
        self._instance = instance
        self._dst = check_isinstance("dst", dst, Cache, allow_none=False)
        self._src = check_isinstance("src", src, Cache, allow_none=False)
        self._dst_row = check_uint32("dst_batch_index", dst_batch_index)
        self._src_row = check_uint32("src_batch_index", src_batch_index)
        self._offset = check_uint64("offset", offset)
        self._size = check_int64("size", size)
        for name, cache in (("src", src), ("dst", dst)):
            if cache.is_blocks_cache:
                raise param_error(f"{name} is a blocks cache, copy_cache is for contiguous ones")
        if self._size != -1 and self._size <= 0:
            raise param_error(f"size={size} must be -1 or positive")
        if req_id is not None:
            check_uint64("req_id", req_id)

    def run(self, *, non_blocking: bool) -> None:
        """Copy; with ``non_blocking`` the copies are left on the device's current stream."""
        dst, src, offset = self._dst, self._src, self._offset
        using = self._instance.using
        with using(src), using(dst), _as_param_errors():
            arguments.check_rows_first(src, dst)
            nbytes = src.layout.row_bytes - offset if self._size == -1 else self._size
            for name, cache in (("src", src), ("dst", dst)):
                row_bytes = cache.layout.row_bytes
                if offset >= row_bytes or nbytes > row_bytes - offset:
                    raise param_error(
                        f"offset={offset} and {nbytes} bytes do not fit a {name} row of"
                        f" {row_bytes} bytes"
                    )
            _check_memory(src, dst)
            ops.copy_rows(
                dst.tensors,
                src.tensors,
                self._dst_row,
                self._src_row,
                offset,
                nbytes,
                non_blocking=non_blocking,
            )
            if non_blocking:
                _keep_until_done((src, dst), using)


class CopyBlocks:
    """Whole blocks within a cache; see ``CacheManager.copy_blocks``.

    Every destination gets what its source held before the call.
    """

    def __init__(
        self,
        instance: Instance,
        cache: Cache,
        copy_block_info: Mapping[int, list[int]] | torch.Tensor,
    ) -> None:
        self._instance = instance
        self._cache = check_isinstance("cache", cache, Cache, allow_none=False)
        self._src_blocks, self._dst_blocks = _fan_out(copy_block_info)
        if not cache.is_blocks_cache:
            raise param_error("cache is contiguous, copy_blocks is for blocks caches")

    def run(self, *, non_blocking: bool) -> None:
        """Copy; with ``non_blocking`` the copies are left on the device's current stream."""
        cache, using = self._cache, self._instance.using
        with using(cache), _as_param_errors():
            arguments.check_rows_first(cache)
            _check_memory(cache)
            ops.copy_blocks(
                cache.tensors, self._src_blocks, self._dst_blocks, non_blocking=non_blocking
            )
            if non_blocking:
                _keep_until_done((cache,), using)


class SwapBlocks:
    """Whole blocks from one placement to the other; see ``CacheManager.swap_blocks``."""

    def __init__(
        self,
        instance: Instance,
        src_cache: Cache,
        dst_cache: Cache,
        src_to_dst: Mapping[int, int] | torch.Tensor,
    ) -> None:
        self._instance = instance
        self._src = check_isinstance("src_cache", src_cache, Cache)
        self._dst = check_isinstance("dst_cache", dst_cache, Cache)
        for name, cache in (("src_cache", src_cache), ("dst_cache", dst_cache)):
            if not cache.is_blocks_cache:
                raise param_error(f"{name} is contiguous, swap_blocks is for blocks caches")
        self._src_blocks, self._dst_blocks = _pairs(src_to_dst)
        _check_swappable(src_cache, dst_cache)

    def run(self, *, non_blocking: bool) -> None:
        """Copy; with ``non_blocking`` the copies are left on the device's current stream."""
        src, dst = self._src, self._dst
        with self._lease(src), self._lease(dst), _as_param_errors():
            _check_memory(src, dst)
            ops.swap_blocks(
                dst.tensors,
                src.tensors,
                self._dst_blocks,
                self._src_blocks,
                non_blocking=non_blocking,
            )
            if non_blocking:
                _keep_until_done((src, dst), self._lease)

    def _lease(self, cache: Cache) -> _C.Lease[Any]:
        # Caches from create_cpu_cache belong to no instance, and others may belong to another one.
        instance = self._instance
        return instance.using(cache) if instance.owns(cache) else cache.lease()


def _keep_until_done(caches: Sequence[Cache], lease: Callable[[Cache], _C.Lease[Any]]) -> None:
    """Keep caches until the copies that were left on the device's current stream are done."""
    device = streams.device_of(cache.device for cache in caches)
    leases: list[_C.Lease[Any]] = []
    try:
        leases += [lease(cache) for cache in caches]
        streams.keep_until_done(device, leases.clear)
    except BaseException:
        # Also after Ctrl-C: nobody else keeps what the copies use.
        streams.wait_until_done(device)
        leases.clear()
        raise


@contextmanager
def _as_param_errors() -> Iterator[None]:
    """What the ops find wrong with ids is ``LLM_PARAM_INVALID`` here.

    Their texts already say where and why.
    """
    try:
        yield
    except LLMException:
        raise
    except (IndexError, ValueError) as error:
        raise param_error(str(error)) from error


def _fan_out(info: Mapping[int, list[int]] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(info, torch.Tensor):
        return _columns("copy_block_info", info)
    check_isinstance("copy_block_info", info, dict, int, allow_none=False)
    for block, targets in info.items():
        check_isinstance(f"copy_block_info[{block}]", targets, list, int, allow_none=False)
    sources = [src for src, targets in info.items() for _ in targets]
    return (
        as_ids(sources, "copy_block_info"),
        as_ids([dst for targets in info.values() for dst in targets], "copy_block_info"),
    )


def _pairs(mapping: Mapping[int, int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(mapping, torch.Tensor):
        return _columns("src_to_dst", mapping)
    check_isinstance("src_to_dst", mapping, dict, int)
    # None gets past the check, and is an AttributeError here, as in the reference.
    return as_ids(list(mapping.keys()), "src_to_dst"), as_ids(list(mapping.values()), "src_to_dst")


def _columns(name: str, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise TypeError(
            f"{name} as a tensor must be int64 of shape [n, 2] (source, destination), got"
            f" {pairs.dtype}"
            f" of shape {list(pairs.shape)}"
        )
    pairs = pairs.cpu()
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def _check_swappable(src: Cache, dst: Cache) -> None:
    arguments.check_rows_first(src, dst)
    if src.layout.row_bytes != dst.layout.row_bytes:
        raise param_error(
            f"block sizes differ: source {src.layout.row_bytes} bytes, destination"
            f" {dst.layout.row_bytes} bytes"
        )
    placements = {src.cache_desc.placement, dst.cache_desc.placement}
    if placements != {Placement.HOST, Placement.DEVICE}:
        raise param_error(
            f"swap_blocks copies between HOST and DEVICE, got {src.cache_desc.placement!s} to"
            f" {dst.cache_desc.placement!s}",
            remedy="use copy_blocks within a cache, or pull_blocks between instances.",
        )
    for name, cache in (("src_cache", src), ("dst_cache", dst)):
        if cache.ended:
            raise param_error(f"{name} has ended: {cache!r}")


def _check_memory(*caches: Cache) -> None:
    """Memory that came as bare addresses may have been freed by its owner.

    An error now rather than a crash.
    """
    for cache in caches:
        if cache.is_unowned:
            check_alive(cache.tensor_addrs, cache.layout.extent, cache.device)
