# SPDX-License-Identifier: Apache-2.0
"""Raw addresses and given tensors: are they what they are said to be?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory import npu_address
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

HOST = torch.device("cpu")
"""The device of host memory."""

_UINT64_END = 1 << 64
_INT64_END = 1 << 63


def address_tensor(addrs: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Addresses as the int64 tensor [n] that the native module takes.

    What is above the int64 range becomes negative.

    Raises:
        ValueError: An int outside uint64.
    """
    if isinstance(addrs, torch.Tensor):
        return addrs
    for index, address in enumerate(addrs):
        if not 0 <= address < _UINT64_END:
            raise ValueError(f"addrs[{index}]={address} is no address: it must be in [0, 2**64)")
    wrapped = [a if a < _INT64_END else a - _UINT64_END for a in addrs]
    return torch.tensor(wrapped, dtype=torch.int64)


def probe(addrs: Sequence[int] | torch.Tensor, nbytes: int, device: torch.device = HOST) -> None:
    """Check that every extent ``[addr, addr + nbytes)`` is memory that may be read and written.

    In host memory the kernel's list of mappings says so, on an NPU the runtime and torch_npu's
    allocator. The answer holds for the moment it was taken in.

    Raises:
        LLMParamError: The first bad address, with its index and what is wrong with it.
        ValueError: An int outside uint64, or ``nbytes`` not positive.
        OSError: The kernel doesn't show this process its mappings (no /proc).
    """
    wrapped = address_tensor(addrs)
    if device.type == HOST.type:
        index, reason = _C.probe_extents(wrapped, nbytes)
    else:
        index, reason = npu_address.why_unusable(wrapped, nbytes, device, thorough=True)
    if index >= 0:
        raise _bad_address(wrapped, index, nbytes, reason)


def check_alive(
    addrs: Sequence[int] | torch.Tensor, nbytes: int, device: torch.device = HOST
) -> None:
    """Check that every extent ``[addr, addr + nbytes)`` is still mapped.

    Cheap enough for every transfer: one or two calls of the system or the runtime per address.

    Raises:
        LLMParamError: The first address that isn't, with its index.
        ValueError: An int outside uint64, or ``nbytes`` not positive.
    """
    wrapped = address_tensor(addrs)
    reason = "no longer mapped"
    if device.type == HOST.type:
        index = _C.check_mapped(wrapped, nbytes)
    else:
        index, reason = npu_address.why_unusable(wrapped, nbytes, device, thorough=False)
    if index >= 0:
        raise _bad_address(wrapped, index, nbytes, reason)


def tensor_over(
    address: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device = HOST
) -> torch.Tensor:
    """Make a tensor that does not own its memory.

    Nothing keeps that memory alive: using the tensor after its owner has freed it crashes the
    process. Probe the address first.

    Raises:
        LLMParamError: Address 0, an address that is no multiple of the element size, or a
            dimension that is not positive.
    """
    try:
        if device.type == HOST.type:
            return _C.tensor_over(address, list(shape), dtype)
        return npu_address.tensor_over(address, shape, dtype, device)
    except (ValueError, TypeError) as error:
        raise error_for(
            LLMStatusCode.LLM_PARAM_INVALID, f"no tensor at address {address:#x}: {error}"
        ) from error


def tensors_over(
    addrs: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device = HOST
) -> list[torch.Tensor]:
    """Make tensors that do not own their memory, after checking that it is there.

    Nothing keeps that memory alive: its owner must outlive the tensors.

    Args:
        addrs: One address per tensor; they may overlap.
        shape: Shape of each tensor.
        dtype: Their element type.
        device: Where the memory is: the CPU, or an NPU with its index.

    Raises:
        LLMParamError: An address that isn't memory of this device over the whole tensor, with its
            index; one that is no multiple of the element size; a dimension that is not positive; a
            device without an index.
        ValueError: An int outside uint64.
    """
    if device.type != HOST.type and device.index is None:
        raise _param_error(f"device={device} has no index", remedy=f'write "{device}:0".')
    nbytes = math.prod(shape) * dtype.itemsize
    if any(dim <= 0 for dim in shape):
        raise _param_error(f"shape={list(shape)} has a dimension that is not positive")
    probe(addrs, nbytes, device)
    return [tensor_over(address, shape, dtype, device) for address in addrs]


def describe_tensors(
    tensors: Sequence[torch.Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, int]:
    """Check given tensors, and say where their rows are.

    Each tensor must have ``shape``, its rows (dimension 0) contiguous in themselves and equally
    far apart in all tensors; or be contiguous with as many elements. No two tensors may share a
    byte: ``kv[:, 0]`` and ``kv[:, 1]`` are fine, ``kv`` twice is not.

    Returns:
        The addresses, int64 [n], and the row stride: bytes from one row to the next (those of a row
        where there is only one).

    Raises:
        LLMParamError: A tensor isn't so, with its index; or there is none.
    """
    if not tensors:
        raise _param_error("no tensors were given")
    row_strides = [
        _row_stride_of(f"tensors[{i}]", t, shape, dtype, device) for i, t in enumerate(tensors)
    ]
    row_stride_bytes = row_strides[0]
    for index, other in enumerate(row_strides):
        if other != row_stride_bytes:
            raise _param_error(
                f"tensors[{index}] has {other} bytes between rows, tensors[0] has"
                f" {row_stride_bytes}",
                remedy="give tensors of equal strides.",
            )
    addrs = address_tensor([tensor.data_ptr() for tensor in tensors])
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    _check_disjoint(addrs, shape[0], row_bytes, row_stride_bytes)
    return addrs, row_stride_bytes


def _row_stride_of(
    name: str, tensor: object, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes between the rows of one checked tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise _param_error(f"{name} is a {type(tensor).__name__}, not a torch.Tensor")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_neg():
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        kind = "a lazily negated view" if tensor.is_neg() else kind
        raise _param_error(f"{name} is {kind}; an ordinary dense tensor is needed")
    if tensor.dtype is not dtype:
        raise _param_error(f"{name} has dtype {tensor.dtype}, the cache has {dtype}")
    if tensor.device.type != device.type or (
        device.index is not None and tensor.device.index != device.index
    ):
        raise _param_error(f"{name} is on {tensor.device}, the cache is on {device}")
    row_stride_bytes = _row_stride(name, tensor, tuple(shape)) * dtype.itemsize
    address = tensor.data_ptr()
    if address == 0:
        raise _param_error(f"{name} has no memory (data_ptr() is 0)")
    if address % dtype.itemsize:
        raise _param_error(
            f"{name} at {address:#x} is not aligned to its elements of {dtype.itemsize} bytes"
        )
    return row_stride_bytes


def _row_stride(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> int:
    """Elements between the rows of one tensor."""
    row = math.prod(shape[1:])
    if tuple(tensor.shape) != shape:
        if tensor.numel() == row * shape[0] and tensor.is_contiguous():
            return row
        raise _param_error(
            f"{name} has shape {list(tensor.shape)}, the cache has {list(shape)}",
            remedy="give tensors of the cache's shape, or contiguous ones with as many elements.",
        )
    if tensor.is_contiguous():  # the ordinary case, which needs no view of a row
        return row
    if not tensor[0].is_contiguous():
        raise _param_error(
            f"{name} has strides {list(tensor.stride())}: its rows are not contiguous",
            remedy="only dimension 0 may be strided.",
        )
    if shape[0] == 1:  # then the stride says nothing
        return row
    if tensor.stride(0) < row:
        raise _param_error(
            f"{name} has stride {tensor.stride(0)} in dimension 0: its {row}-element rows overlap",
            remedy="give a tensor that was not expanded.",
        )
    return tensor.stride(0)


def _check_disjoint(addrs: torch.Tensor, rows: int, row_bytes: int, row_stride_bytes: int) -> None:
    """Refuse tensors that share a byte.

    Row r of tensor i starts at ``addrs[i] + r * row_stride_bytes``.
    """
    starts, order = addrs.sort()
    extent = (rows - 1) * row_stride_bytes + row_bytes
    # Only tensors that start within the extent of another can touch it.
    ends = torch.searchsorted(starts, starts + extent)
    positions = torch.arange(len(starts))
    for low in torch.nonzero(ends > positions + 1).flatten().tolist():
        distance = starts[low + 1 : int(ends[low])] - starts[low]
        whole = distance // row_stride_bytes
        rest = distance - whole * row_stride_bytes
        # Row r of the later tensor lies `rest` bytes after row r + whole of the earlier one, and
        # before the next.
        touches = (rest < row_bytes) | ((row_stride_bytes - rest < row_bytes) & (whole + 1 < rows))
        if bool(touches.any()):
            high = low + 1 + int(touches.nonzero()[0])
            one, other = sorted((int(order[low]), int(order[high])))
            raise _param_error(
                f"tensors[{one}] at {int(addrs[one]):#x} and "
                f"tensors[{other}] at {int(addrs[other]):#x} overlap",
                remedy="give each tensor memory of its own.",
            )


def _bad_address(addrs: torch.Tensor, index: int, nbytes: int, reason: str) -> LLMException:
    address = int(addrs[index]) % _UINT64_END
    return _param_error(
        f"addrs[{index}]={address:#x}: {reason}, wanted {nbytes} bytes to read and write",
        remedy="give data_ptr() of tensors that are alive and large enough, or the tensors.",
    )


def _param_error(message: str, remedy: str = "") -> LLMException:
    return error_for(LLMStatusCode.LLM_PARAM_INVALID, message, remedy=remedy)
