# SPDX-License-Identifier: Apache-2.0
"""Cache memory on an NPU, from torch_npu's caching allocator."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from llm_datadist_torch.memory.allocate import (
    Allocation,
    CacheMemory,
    offsets_of,
    tensor_nbytes,
    tensors_in,
)
from llm_datadist_torch.memory.npu_address import (
    WITHOUT_EXPANDABLE_SEGMENTS,
    attach_thread,
    segment_at,
    segments_of,
    torch_npu,
)
from llm_datadist_torch.memory.region import Region
from llm_datadist_torch.values.status import (
    LLMException,
    LLMOutOfMemoryError,
    LLMStatusCode,
    error_for,
)

REGION_ALIGNMENT = 2 << 20
"""Regions start at multiples of this many bytes, as HCCS wants it."""

_settings_lock = threading.Lock()


class NpuMemory(CacheMemory):
    """Memory of one NPU, one region per allocation, counted in ``torch.npu.memory_stats``.

    Thread safety: stateless.

    Args:
        device: The NPU, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> Allocation:
        """See :meth:`CacheMemory.allocate`. Starts on a 2 MiB boundary, not zeroed.

        Waits for the current stream: torch_npu gives out memory that kernels started earlier may
        still use, which is safe for kernels on that stream and for nothing else.

        Raises:
            LLMDeviceError: The device reported an error.
        """
        offsets, total = offsets_of(count, tensor_nbytes(shape, dtype), self._check_obtainable)
        base, region = self.reserve(total)
        return Allocation(tensors_in(base, offsets, shape, dtype), region)

    def reserve(self, nbytes: int) -> tuple[torch.Tensor, Region]:
        """Make one uint8 tensor ``[nbytes]`` that is a whole region.

        Raises:
            LLMOutOfMemoryError: The device doesn't have it.
            LLMDeviceError: The device reported an error.
        """
        self._check_obtainable(nbytes)
        base = self._in_one_piece(nbytes + REGION_ALIGNMENT)
        try:
            torch_npu().npu.current_stream(self._device).synchronize()
        except RuntimeError as error:
            raise _device_error("waiting for the current stream", self._device, error) from error
        skip = -base.data_ptr() % REGION_ALIGNMENT
        (aligned,) = tensors_in(base, [skip], (nbytes,), torch.uint8)
        reason = "it is memory of an NPU"
        return aligned, Region(aligned.data_ptr(), nbytes, reason=reason, keepalive=aligned)

    def synchronize(self) -> None:
        """Wait for everything that was started on the device.

        Raises:
            LLMDeviceError: The device reported an error.
        """
        try:
            attach_thread()
            torch_npu().npu.synchronize(self._device)
        except RuntimeError as error:
            raise _device_error("waiting for the device", self._device, error) from error

    def _in_one_piece(self, nbytes: int) -> torch.Tensor:
        """Bytes that are mapped as a whole, as a transfer engine must register them.

        With expandable segments torch_npu maps memory piece by piece, and unmaps pieces that are
        free. So those are switched off for a moment where they are on.
        """
        base = self._empty(nbytes)
        if not self._is_expandable(base):
            return base
        del base
        set_allocator = torch_npu().npu.memory._set_allocator_settings  # noqa: SLF001
        with _settings_lock:
            set_allocator("expandable_segments:False")
            try:
                base = self._empty(nbytes)
            finally:
                set_allocator("expandable_segments:True")
        if not self._is_expandable(base):
            return base
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            f"torch_npu gives memory of {self._device} in expandable segments only, which transfer"
            " engines can't register as a whole",
            remedy=f"{WITHOUT_EXPANDABLE_SEGMENTS}.",
        )

    def _is_expandable(self, base: torch.Tensor) -> bool:
        segment = segment_at(segments_of(self._device), base.data_ptr())
        return segment is not None and segment.expandable

    def _empty(self, nbytes: int) -> torch.Tensor:
        try:
            with torch.inference_mode(mode=False):
                return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            # Without its traceback, which would keep what the allocator has given meanwhile.
            why = str(error).partition("\n")[0]
            raise self._out_of_memory(nbytes, f": {why}") from error.with_traceback(None)
        except RuntimeError as error:
            raise _device_error(f"allocating {nbytes} bytes", self._device, error) from error

    def _check_obtainable(self, nbytes: int) -> None:
        if nbytes > self._memory_info()[1]:
            raise self._out_of_memory(nbytes)

    def _out_of_memory(self, nbytes: int, why: str = "") -> LLMOutOfMemoryError:
        free, total = self._memory_info()
        return LLMOutOfMemoryError(
            f"asked for {nbytes} bytes of {self._device}, which has {free} bytes free of"
            f" {total}{why}",
            requested_bytes=nbytes,
            free_bytes=free,
            remedy="ask for fewer or smaller tensors, or free tensors on that device.",
        )

    def _memory_info(self) -> tuple[int, int]:
        """Free bytes and all bytes of the device."""
        try:
            attach_thread()
            free, total = torch_npu().npu.mem_get_info(self._device)
        except RuntimeError as error:
            raise _device_error("asking for its memory", self._device, error) from error
        return free, total


def _device_error(doing: str, device: torch.device, error: RuntimeError) -> LLMException:
    return error_for(
        LLMStatusCode.LLM_DEVICE_MEM_ERROR,
        f"{device}: {doing} failed: {error}",
        remedy="look at the device's state (npu-smi info) and its logs.",
    )
