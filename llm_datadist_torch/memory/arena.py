# SPDX-License-Identifier: Apache-2.0
"""A pool (``mem_pool_cfg``): one region with a hard budget, cut into pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory.address import HOST, tensor_over
from llm_datadist_torch.memory.allocate import (
    Allocation,
    CacheMemory,
    allocate_bytes,
    tensor_nbytes,
)
from llm_datadist_torch.memory.region import Region
from llm_datadist_torch.values.status import LLMOutOfMemoryError, LLMStatusCode, error_for


class PoolSize(Protocol):
    """What an arena needs of a pool configuration."""

    @property
    def memory_size(self) -> int:
        """Bytes of the region."""

    @property
    def page_shift(self) -> int:
        """Pages are ``1 << page_shift`` bytes; in [10, 31)."""


@dataclass(frozen=True)
class ArenaStats:
    """How full an arena is.

    Attributes:
        total_bytes: Bytes in whole pages; a partial last page of the region is not usable.
        free_bytes: Bytes in free pages.
        largest_free_bytes: The largest tensor that would fit now.
        spans_in_use: Tensors that are alive.
    """

    total_bytes: int
    free_bytes: int
    largest_free_bytes: int
    spans_in_use: int


class ArenaMemory(CacheMemory):
    """Memory from one region, reserved at construction (reference API, 8.4).

    Each tensor is a span of whole pages at a page-aligned offset, from the smallest free span that
    suffices. The span is free again as soon as neither the tensor nor the cache refers to it.
    Memory is not zeroed between uses. The region lives until the arena and all of its tensors are
    gone.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(
        self,
        pool: PoolSize,
        reserve: Callable[[int], tuple[torch.Tensor, Region]] = allocate_bytes,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        """Reserve the region. Touches no page of it.

        Args:
            pool: ``memory_size`` in bytes and ``page_shift``.
            reserve: Makes the region and the uint8 tensor over it; host memory by default.
            synchronize: Waits until nothing that was started with earlier tensors still uses their
                pages; None where nothing can.

        Raises:
            LLMOutOfMemoryError: The region can't be had; also for a ``memory_size`` of 0
                (reference API, 4).
            LLMParamError: ``page_shift`` out of range, or a page larger than the pool.
        """
        if not 10 <= pool.page_shift < 31:
            raise error_for(
                LLMStatusCode.LLM_PARAM_INVALID,
                f"page_shift={pool.page_shift} is out of range [10, 31)",
            )
        if pool.memory_size <= 0:
            raise LLMOutOfMemoryError(
                f"a pool of {pool.memory_size} bytes holds nothing",
                requested_bytes=pool.memory_size,
                remedy="give the pool a positive memory_size.",
            )
        if pool.memory_size >> pool.page_shift == 0:
            raise error_for(
                LLMStatusCode.LLM_PARAM_INVALID,
                f"memory_size={pool.memory_size} is less than a page ({1 << pool.page_shift})",
            )
        base, self.region = reserve(pool.memory_size)
        self.base = base.data_ptr()
        self._page_shift = pool.page_shift
        self._synchronize = synchronize
        self._device = base.device
        self._arena = _C.Arena(base, pool.page_shift)

    @property
    def stats(self) -> ArenaStats:
        """How full it is at this moment."""
        return ArenaStats(*self._arena.stats())

    def allocate(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> Allocation:
        """See :meth:`CacheMemory.allocate`. The region is the arena's own, whatever the cache.

        Raises:
            LLMOutOfMemoryError: Not that many free stretches of pages; no counter has changed.
            LLMParamError: ``count`` or a dimension is not positive.
        """
        nbytes = tensor_nbytes(shape, dtype)
        if count <= 0:
            raise error_for(
                LLMStatusCode.LLM_PARAM_INVALID, f"{count} tensors: at least 1 is needed"
            )
        spans = None
        # What can't fit may not even be countable in 64 bits.
        if nbytes * count <= self.region.nbytes:
            spans = self._arena.spans(count, nbytes)
        if spans is None:
            raise self._out_of_memory(count, nbytes)
        if self._synchronize is not None:
            self._synchronize()
        # A span is free when neither its tensor's storage nor the cache refers to it.
        owner = tuple(spans)
        if self._device != HOST:
            tensors = tuple(_tensor_in(span, shape, dtype, self._device) for span in spans)
            return Allocation(tensors, self.region, None, owner)
        flag = _C.MoveFlag()
        tensors = tuple(span.tensor(list(shape), dtype, flag) for span in spans)
        return Allocation(tensors, self.region, flag, owner)

    def _out_of_memory(self, count: int, nbytes: int) -> LLMOutOfMemoryError:
        stats = self.stats
        page = 1 << self._page_shift
        pages = -(-nbytes // page)
        return LLMOutOfMemoryError(
            f"asked for {count} tensors of {nbytes} bytes ({pages} pages of {page}) each, "
            f"{count * pages * page} bytes ({count * pages} pages) in all; the pool has "
            f"{stats.free_bytes} bytes ({stats.free_bytes // page} pages) free "
            f"of {stats.total_bytes}, {stats.largest_free_bytes} bytes "
            f"({stats.largest_free_bytes // page} pages) in one piece",
            requested_bytes=count * pages * page,
            free_bytes=stats.free_bytes,
            largest_free_bytes=stats.largest_free_bytes,
            remedy="deallocate caches and drop tensors taken from them, or raise memory_size.",
        )


def _tensor_in(
    span: _C.Span, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of device memory that gives the span back when its storage goes.

    torch keeps the Python object of a storage, and so its attributes, for as long as the storage.
    """
    tensor = tensor_over(span.address, shape, dtype, device)
    tensor.untyped_storage().llm_datadist_span = span  # type: ignore[attr-defined]
    return tensor
