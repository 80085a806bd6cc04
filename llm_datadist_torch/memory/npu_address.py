# SPDX-License-Identifier: Apache-2.0
"""Addresses of NPU memory: whose they are, and tensors over them. torch_npu has been imported."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

logger = logging.getLogger("llm_datadist_torch")

_STEP = 2 << 20
"""Device memory comes in pages of this size or, rarely, smaller ones: one question per step."""
_UINT64_END = 1 << 64
WITHOUT_EXPANDABLE_SEGMENTS = (
    "set PYTORCH_NPU_ALLOC_CONF=expandable_segments:False (leaving it out is not enough under"
    " vllm-ascend, which adds True)"
)
"""What keeps torch_npu from giving memory that is mapped piece by piece: part of remedies."""
_DEVICE = 1  # ACL_MEM_LOCATION_TYPE_DEVICE

_Where = Callable[[int], tuple[int, int] | None]


def torch_npu() -> Any:  # noqa: ANN401 (an untyped module)
    """The module torch_npu; ``choose_device`` decides whether it is imported."""
    return import_module("torch_npu")


def attach_thread() -> None:
    """Make the runtime know this thread, on the device that torch says is its current one.

    The runtime refuses questions of threads that have set no device, and torch_npu does that with
    a thread's first operator only.
    """
    npu = torch_npu().npu
    try:
        npu.set_device(npu.current_device())
    except RuntimeError:
        # The default device of a thread that has set none is gone; any other can answer, too.
        logger.debug("device 0 does not answer", exc_info=True)
        npu.set_device(npu.device_count() - 1)


@dataclass(frozen=True)
class Segment:
    """One piece of memory that torch_npu's allocator has from the runtime.

    Attributes:
        start: Its first address.
        end: The address behind it.
        expandable: Whether it is mapped piece by piece (``expandable_segments``).
        blocks: (start, end, allocated) of the tensors that it is cut into.
    """

    start: int
    end: int
    expandable: bool
    blocks: tuple[tuple[int, int, bool], ...]


def segments_of(device: torch.device) -> list[Segment]:
    """torch_npu's segments of a device by address; none for an allocator that doesn't tell."""
    try:
        snapshot = torch_npu().npu.memory_snapshot()
    except RuntimeError:  # a pluggable allocator
        return []
    found = [_segment(each) for each in snapshot if each["device"] == device.index]
    return sorted(found, key=lambda segment: segment.start)


def segment_at(segments: Sequence[Segment], address: int) -> Segment | None:
    """The segment that an address lies in."""
    at = bisect_right(segments, address, key=lambda segment: segment.start) - 1
    return segments[at] if at >= 0 and address < segments[at].end else None


def warn_of_expandable(tensors: Sequence[torch.Tensor]) -> None:
    """Warn of tensors in expandable segments; our own memory is never there."""
    segments = segments_of(tensors[0].device)
    places = (segment_at(segments, tensor.data_ptr()) for tensor in tensors)
    if any(place is not None and place.expandable for place in places):
        logger.warning(
            "this memory is in expandable segments of torch_npu's, which are mapped piece by piece:"
            " a transfer engine may refuse to register it. Remedy: %s, or let this library allocate"
            " the cache.",
            WITHOUT_EXPANDABLE_SEGMENTS,
        )


def why_unusable(
    addrs: torch.Tensor, nbytes: int, device: torch.device, *, thorough: bool
) -> tuple[int, str]:
    """Look for an extent ``[addr, addr + nbytes)`` that isn't memory of this device.

    Args:
        addrs: Addresses, int64 [n].
        nbytes: Bytes of each extent.
        device: With its index.
        thorough: Look at every page, and ask torch_npu's allocator whether what lies in its memory
            is all one allocated block. Without it, only the two ends are looked at.

    Returns:
        Index and reason of the first such extent; (-1, "") if there is none.

    Raises:
        ValueError: ``nbytes`` is not positive.
    """
    if nbytes <= 0:
        raise ValueError(f"nbytes={nbytes} is not positive")
    where = _asking_the_runtime()
    segments = segments_of(device) if thorough or where is None else []
    for index, wrapped in enumerate(addrs.tolist()):
        address = wrapped % _UINT64_END
        reason = _why_not(address, nbytes, device, where, _STEP if thorough else nbytes)
        if not reason:
            segment = segment_at(segments, address)
            reason = "" if segment is None else _why_not_allocated(segment, address, nbytes)
            if segment is None and where is None:
                reason = "not memory of torch_npu's, and this runtime can't tell whose"
        if reason:
            return index, reason
    return -1, ""


def tensor_over(
    address: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Make an NPU tensor that does not own its memory.

    Its storage is torch_npu's own kind: with torch's plain one, operators crash.
    """
    module = torch_npu()
    nbytes = math.prod(shape) * dtype.itemsize
    with torch.inference_mode(mode=False):
        storage = module._C._construct_storage_from_data_pointer(address, device, nbytes)  # noqa: SLF001
        metadata = {
            "size": tuple(shape),
            "stride": tuple(math.prod(shape[at + 1 :]) for at in range(len(shape))),
            "dtype": dtype,
            "device": device,
            "storage_offset": 0,
        }
        tensor: torch.Tensor = module._C._construct_NPU_Tensor_From_Storage_And_Metadata(  # noqa: SLF001
            metadata, storage
        )
    return tensor


def _segment(raw: dict[str, Any]) -> Segment:
    blocks: list[tuple[int, int, bool]] = []
    at = raw["address"]
    for block in raw["blocks"]:
        # What a tensor asked for, without the allocator's padding.
        nbytes = block.get("requested_size") or block["size"]
        blocks.append((at, at + nbytes, block["state"] == "active_allocated"))
        at += block["size"]
    end = raw["address"] + raw["total_size"]
    return Segment(raw["address"], end, bool(raw.get("is_expandable")), tuple(blocks))


def _why_not_allocated(segment: Segment, address: int, nbytes: int) -> str:
    for start, end, allocated in segment.blocks:
        if start <= address < end:
            if not allocated:
                return "torch_npu has freed it"
            if address + nbytes > end:
                return f"its tensor ends {end - address} bytes behind it"
            return ""
    return "torch_npu has freed it"


def _why_not(
    address: int, nbytes: int, device: torch.device, where: _Where | None, step: int
) -> str:
    if address == 0:
        return "the null address"
    if where is None:
        return ""
    last = address + nbytes - 1
    for at in (*range(address, last, step), last):
        found = where(at)
        ending = "" if at == address else f" from byte {at - address} on"
        if found is None or found[0] != _DEVICE:
            return f"not device memory{ending}"
        if found[1] != device.index:
            return f"memory of npu:{found[1]}, not of {device}{ending}"
    return ""


class _PointerAttributes(ctypes.Structure):
    """``aclrtPtrAttributes``."""

    _fields_ = (
        ("location_id", ctypes.c_uint32),
        ("location_type", ctypes.c_int),
        ("page_size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 4),
    )


@functools.cache
def _get_attributes() -> Any:  # noqa: ANN401 (a foreign function)
    """The runtime's function, or None: older ones don't have it."""
    # The very library that torch_npu uses; never a second copy of it.
    runtime = ctypes.CDLL("libascendcl.so", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    function = getattr(runtime, "aclrtPointerGetAttributes", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.POINTER(_PointerAttributes))
        function.restype = ctypes.c_int
    return function


def _asking_the_runtime() -> _Where | None:
    """Asks the runtime for (kind, device number) of an address; None if it can't tell."""
    function = _get_attributes()
    if function is None:
        return None
    attach_thread()

    def where(address: int) -> tuple[int, int] | None:
        attributes = _PointerAttributes()
        if function(address, ctypes.byref(attributes)) != 0:
            return None
        return attributes.location_type, attributes.location_id

    return where
