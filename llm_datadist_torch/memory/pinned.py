# SPDX-License-Identifier: Apache-2.0
"""Pinned host memory, which an NPU copies from and to asynchronously."""

from __future__ import annotations

import logging
import resource
import sys
import threading
from collections.abc import Sequence

import torch

from llm_datadist_torch.memory.allocate import (
    Allocation,
    CacheMemory,
    available_bytes,
    check_obtainable,
    offsets_of,
    out_of_memory,
    tensor_nbytes,
    tensors_in,
)
from llm_datadist_torch.memory.container import container_limit
from llm_datadist_torch.memory.region import Region
from llm_datadist_torch.values.status import LLMOutOfMemoryError, LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

_lock = threading.Lock()
_warned = False


class PinnedMemory(CacheMemory):
    """Host memory from torch's pinned allocator, for DMA. Peers can't map it.

    Thread safety: stateless.
    """

    def allocate(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> Allocation:
        """See :meth:`CacheMemory.allocate`. Starts where torch's allocator puts it; not zeroed.

        Raises:
            LLMOutOfMemoryError: The memory could not be had or not be pinned.
            LLMFeatureNotEnabledError: torch has no accelerator.
        """
        offsets, total = offsets_of(count, tensor_nbytes(shape, dtype), check_obtainable)
        base, region = allocate_pinned_bytes(total)
        return Allocation(tensors_in(base, offsets, shape, dtype), region)


def allocate_pinned_bytes(nbytes: int) -> tuple[torch.Tensor, Region]:
    """Make one uint8 tensor ``[nbytes]`` in pinned host memory; not zeroed.

    Raises:
        LLMOutOfMemoryError: The memory could not be had or not be pinned.
        LLMFeatureNotEnabledError: torch has no accelerator.
    """
    if not torch.accelerator.is_available():
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            "pinned memory needs an accelerator, and torch has none available",
            remedy="use HostMemory.",
        )
    check_obtainable(nbytes)
    # When a pin fails, torch_npu 2.13 gives a tensor at address 0 without an error, and keeps
    # that for the next of its size: one failure would be for ever if its cache weren't emptied.
    base = _pin(nbytes)
    if base.data_ptr() == 0:
        del base
        _empty_pinned_cache()
        base = _pin(nbytes)
    if base.data_ptr() == 0:
        del base
        _empty_pinned_cache()
        raise _refused(nbytes, "the allocator gave address 0")
    reason = "pinned memory belongs to the device's allocator"
    return base, Region(base.data_ptr(), nbytes, reason=reason, keepalive=base)


def warn_of_pageable(tensors: Sequence[torch.Tensor]) -> None:
    """Warn, once per process, of host tensors that are not pinned, where an NPU is in use."""
    global _warned
    module = sys.modules.get("torch_npu")
    # Looking must not initialise a device.
    if _warned or module is None or not module.npu.is_initialized():
        return
    if all(tensor.is_pinned() for tensor in tensors):
        return
    with _lock:
        first, _warned = not _warned, True
    if first:
        logger.warning(
            "this host memory is not pinned: copies between it and an NPU work, but hold up the"
            " calling thread and are slower. Use torch.empty(..., pin_memory=True)."
        )


def _pin(nbytes: int) -> torch.Tensor:
    try:
        with torch.inference_mode(mode=False):
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    except (RuntimeError, MemoryError) as error:
        raise _refused(nbytes, str(error)) from error


def _refused(nbytes: int, why: str) -> LLMOutOfMemoryError:
    """The error for memory that could not be pinned: often there is enough, and a limit forbids."""
    message, available = f"pinning {nbytes} bytes failed: {why}", available_bytes()
    if available is None or nbytes > available:
        return out_of_memory(message, nbytes)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
    limit = container_limit(0)
    return out_of_memory(
        f"{message}; there is memory, but the driver refused to pin it",
        nbytes,
        remedy=(
            f"look at what limits locked memory: RLIMIT_MEMLOCK (`ulimit -l`) is {locked}, the"
            f" container's memory is {'unlimited' if limit is None else f'{limit} bytes'}, and the"
            " driver has limits of its own (its log, dmesg); or use a smaller host_mem_pool_cfg."
        ),
    )


def _empty_pinned_cache() -> None:
    module = sys.modules.get("torch_npu")
    if module is not None:
        module.npu.host_empty_cache()
