# SPDX-License-Identifier: Apache-2.0
"""The copy ops of torch: their schemas, and a kernel per device. Imported by ops.py.

The ops are registered from Python, because what they do to tensors before and after a copy is a
matter of microseconds, while C++ that registers ops would have to be built against one torch. A
kernel checks its arguments and copies in C++ (csrc/copy_plans.h), with the GIL released.

``non_blocking`` leaves the copies on the device's current stream, where there is one; host memory
must then live until the stream has passed (ops.py sees to it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory import device_copies

Tensors = Sequence[torch.Tensor]

_OPTIONS_AND_RESULT = ", *, bool non_blocking=False) -> ()"
_SCHEMAS = (
    "copy_blocks(Tensor(a!)[] tensors, Tensor src_ids, Tensor dst_ids",
    "swap_blocks(Tensor(a!)[] dst, Tensor[] src, Tensor dst_ids, Tensor src_ids",
    "copy_rows(Tensor(a!)[] dst, Tensor[] src, int dst_row, int src_row, int offset, int nbytes",
)

# Which calls do the work on an NPU (weighed on paper: a launch costs the host some 3 us, and a copy
# within the device goes through its DMA engine, which a gather on the vector cores outruns):
# - host <-> device: one batch for all runs of all tensors (csrc/device_copy.h);
# - within the device, few runs: one copy each;
# - within the device, from _INDEX_FROM_COPIES on: a gather and a scatter per tensor, if its blocks
#   lie side by side.
# 2-D copies are not used: block ids are rarely regular, and what is regular merges into runs.
_INDEX_FROM_COPIES = 16
_GATHER_BYTES = 32 << 20
"""Memory that a gather may take at a time: KV caches leave little on a device."""

# The dtype that gather and scatter take a tensor for, by its element size: one that those kernels
# surely know, as only bits are moved.
_MOVED_AS = {1: torch.int8, 2: torch.float16, 4: torch.int32, 8: torch.int64}


# -- in host memory: done by the copy engine before the return


def _copy_blocks_on_host(
    tensors: Tensors,
    src_ids: torch.Tensor,
    dst_ids: torch.Tensor,
    *,
    non_blocking: bool = False,  # noqa: ARG001 (done on return)
) -> None:
    plan = _C.BlocksPlan(tensors, src_ids, dst_ids)
    if not plan.nothing:
        plan.copy()
        _mark_written(tensors)


def _swap_blocks_on_host(
    dst: Tensors,
    src: Tensors,
    dst_ids: torch.Tensor,
    src_ids: torch.Tensor,
    *,
    non_blocking: bool = False,  # noqa: ARG001 (done on return)
) -> None:
    _copy_on_host(_C.RowsPlan.of_blocks(dst, src, dst_ids, src_ids), dst)


def _copy_rows_on_host(
    dst: Tensors,
    src: Tensors,
    dst_row: int,
    src_row: int,
    offset: int,
    nbytes: int,
    *,
    non_blocking: bool = False,  # noqa: ARG001 (done on return)
) -> None:
    _copy_on_host(_C.RowsPlan.of_bytes(dst, src, dst_row, src_row, offset, nbytes), dst)


def _copy_on_host(plan: _C.RowsPlan, dst: Tensors) -> None:
    if not plan.nothing:
        plan.copy()
        _mark_written(dst)


# -- in NPU memory, or between it and host memory: put on the NPU's current stream, and so in order
#    with the caller's other work there


def _copy_blocks_on_npu(
    tensors: Tensors, src_ids: torch.Tensor, dst_ids: torch.Tensor, *, non_blocking: bool = False
) -> None:
    plan = _C.BlocksPlan(tensors, src_ids, dst_ids)
    if plan.nothing:
        return
    device = tensors[0].device
    with device_copies.current_device(device):
        # Blocks that are both read and written go in one piece, or in order.
        in_one_piece = not plan.interfere or dst_ids.numel() * plan.nbytes <= _GATHER_BYTES
        if plan.copies >= _INDEX_FROM_COPIES and in_one_piece and _can_be_indexed(tensors, tensors):
            _copy_by_index(tensors, tensors, dst_ids, src_ids, plan.nbytes)
        elif plan.interfere:
            # Goes back to the allocator on return, for later work of this stream only.
            staging = torch.empty(plan.staging_bytes, dtype=torch.uint8, device=device)
            plan.submit_in_order(staging.data_ptr(), device_copies.stream_of(device))
        else:
            plan.submit(device_copies.stream_of(device))
        _finish(device, tensors, non_blocking=non_blocking)
    _mark_written(tensors)


def _swap_blocks_on_npu(
    dst: Tensors,
    src: Tensors,
    dst_ids: torch.Tensor,
    src_ids: torch.Tensor,
    *,
    non_blocking: bool = False,
) -> None:
    plan = _C.RowsPlan.of_blocks(dst, src, dst_ids, src_ids)
    by_index = (
        plan.copies >= _INDEX_FROM_COPIES
        and dst[0].device == src[0].device
        and _can_be_indexed(dst, src)
    )
    _copy_on_npu(plan, dst, src, (dst_ids, src_ids) if by_index else None, non_blocking)


def _copy_rows_on_npu(
    dst: Tensors,
    src: Tensors,
    dst_row: int,
    src_row: int,
    offset: int,
    nbytes: int,
    *,
    non_blocking: bool = False,
) -> None:
    plan = _C.RowsPlan.of_bytes(dst, src, dst_row, src_row, offset, nbytes)
    _copy_on_npu(plan, dst, src, None, non_blocking)


def _copy_on_npu(
    plan: _C.RowsPlan,
    dst: Tensors,
    src: Tensors,
    index: tuple[torch.Tensor, torch.Tensor] | None,
    non_blocking: bool,
) -> None:
    """Carry out `plan`: by gather and scatter if there is an ``index`` (dst_ids, src_ids)."""
    device = device_copies.npu_of(dst[0].device, src[0].device)
    if plan.nothing:
        return
    with device_copies.current_device(device):
        if index is not None:
            _copy_by_index(dst, src, *index, plan.nbytes)
        else:
            plan.submit(device_copies.stream_of(device))
        _finish(device, [*dst, *src], non_blocking=non_blocking)
    _mark_written(dst)


def _moved_as(tensor: torch.Tensor) -> torch.dtype | None:
    return tensor.dtype if tensor.dtype == torch.bfloat16 else _MOVED_AS.get(tensor.element_size())


def _can_be_indexed(dst: Tensors, src: Tensors) -> bool:
    """Whether gather and scatter can copy blocks of ``src`` to blocks of ``dst``."""
    kind = _moved_as(dst[0])
    return kind is not None and all(
        _moved_as(tensor) == kind and tensor.is_contiguous() for tensor in (*dst, *src)
    )


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, of which _can_be_indexed() holds, as [blocks, elements]."""
    kind = _moved_as(tensor) or tensor.dtype
    return tensor.detach().view(kind).view(tensor.shape[0], -1)


def _copy_by_index(
    dst: Tensors, src: Tensors, dst_ids: torch.Tensor, src_ids: torch.Tensor, nbytes: int
) -> None:
    """Gather from ``src`` and scatter to ``dst``: in a piece all is read before any is written."""
    to, at = dst_ids.to(dst[0].device), src_ids.to(dst[0].device)
    step = max(_GATHER_BYTES // nbytes, 1)
    for first in range(0, to.numel(), step):
        to_piece, from_piece = to[first : first + step], at[first : first + step]
        for target, source in zip(dst, src, strict=True):
            gathered = torch.index_select(_as_rows(source), 0, from_piece)
            _as_rows(target).index_copy_(0, to_piece, gathered)


def _finish(device: torch.device, tensors: Tensors, *, non_blocking: bool) -> None:
    """Wait for the stream, or tell the allocator that it still uses the tensors."""
    if not non_blocking:
        _C.wait_for_stream(device_copies.stream_of(device))
        return
    stream = torch.get_device_module(device).current_stream(device)
    for tensor in tensors:
        if tensor.device == device:
            tensor.record_stream(stream)


# -- for all devices


def _mark_written(tensors: Tensors) -> None:
    """Tell autograd."""
    torch.autograd.graph.increment_version(tensors)


def _writes_in_place(*arguments: object, non_blocking: bool = False) -> None:
    """The fake kernel of every op: it returns nothing, so there is no shape to work out."""


# PyTorch's name for devices from outside, of which torch_npu makes the NPU, is PrivateUse1.
_KERNELS = {
    "CPU": (_copy_blocks_on_host, _swap_blocks_on_host, _copy_rows_on_host),
    "PrivateUse1": (_copy_blocks_on_npu, _swap_blocks_on_npu, _copy_rows_on_npu),
}

library: Any = torch.library.Library("llm_datadist_torch", "DEF")  # type: ignore[no-untyped-call]
"""Keeps the ops registered."""


def _register() -> None:
    for index, schema in enumerate(_SCHEMAS):
        name = library.define(schema + _OPTIONS_AND_RESULT, tags=[torch.Tag.pt2_compliant_tag])
        for key, kernels in _KERNELS.items():
            library.impl(name, kernels[index], key)
        torch.library.register_fake(f"llm_datadist_torch::{name}", _writes_in_place, lib=library)


_register()
