# SPDX-License-Identifier: Apache-2.0
"""Copies between tensors as torch ops: typed wrappers, and the fakes that torch.compile needs.

In every op dimension 0 of a tensor is its row or block. Tensors may be strided in dimension 0
(views with gaps), each row must be contiguous. Everything is checked before the first byte moves,
and the GIL is released while bytes move.

On a device everything happens on its current stream, in order with other work there. The calls
return when all bytes are there; with ``non_blocking`` they leave the copies on the stream, and keep
what these need alive. Tensors of one call are in host memory, or on one device. Page-locked host
memory is copied asynchronously, other host memory before the return.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from numbers import Integral
from typing import TypeAlias

import torch

from llm_datadist_torch import _C as _C  # registers torch.ops.llm_datadist_torch
from llm_datadist_torch import streams

Ids: TypeAlias = "Sequence[int] | torch.Tensor"

_ops = torch.ops.llm_datadist_torch
_NO_IDS = torch.empty(0, dtype=torch.int64)


def as_ids(ids: Ids, name: str = "ids") -> torch.Tensor:
    """Block ids as a tensor, converted once.

    Args:
        ids: A sequence of ints (NumPy's too), or a 1-D integer tensor on any device.
        name: What the caller calls them, for messages.

    Returns:
        int64 CPU tensor of shape [n], always a copy.

    Raises:
        TypeError: Not ints, or a tensor of another kind (bool and floating point are refused, not
            rounded).
        ValueError: A tensor that is not 1-D, or an id that does not fit in 64 bits.
    """
    if isinstance(ids, torch.Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got a tensor of {ids.dtype}")
        if ids.dim() != 1:
            raise ValueError(f"{name} must be 1-D, got a tensor of shape {tuple(ids.shape)}")
        # A copy, so that nobody can change ids between their check and their use.
        return ids.to(device="cpu", dtype=torch.int64, copy=True)
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of ints or a tensor, got {type(ids).__name__}")
    # torch.tensor would round floats and take bools; a set of types costs little and catches both.
    wrong = {kind for kind in set(map(type, ids)) if not _is_id_type(kind)}
    if wrong:
        at = next(i for i, value in enumerate(ids) if type(value) in wrong)
        raise TypeError(f"{name}[{at}]={ids[at]!r} is a {type(ids[at]).__name__}, expected int")
    try:
        # An array converts a list three times as fast as torch.tensor does.
        values = array("q", ids)
    except OverflowError as error:
        at = next(i for i, value in enumerate(ids) if not -(2**63) <= value < 2**63)
        raise ValueError(f"{name}[{at}]={ids[at]} does not fit in 64 bits") from error
    return torch.frombuffer(values, dtype=torch.int64) if values else _NO_IDS.clone()


def _is_id_type(kind: type) -> bool:
    return kind is int or (kind is not bool and issubclass(kind, Integral))


def copy_blocks(
    tensors: Sequence[torch.Tensor], src_ids: Ids, dst_ids: Ids, *, non_blocking: bool = False
) -> None:
    """Copy block ``src_ids[i]`` to block ``dst_ids[i]`` in each tensor.

    Every destination gets what its source held before the call, also in chains, fans and cycles.

    Args:
        tensors: Tensors of equal block size and pitch, written in place.
        src_ids: Blocks read, [n].
        dst_ids: Blocks written, [n], all different.
        non_blocking: Leave the copies on the device's current stream.

    Raises:
        IndexError: An id out of range, with its position.
        ValueError: A repeated destination, ids of different lengths, or tensors that are cut
            differently or share memory.
    """
    src, dst = as_ids(src_ids, "src_ids"), as_ids(dst_ids, "dst_ids")
    _ops.copy_blocks(list(tensors), src, dst, non_blocking=non_blocking)


def swap_blocks(
    dst: Sequence[torch.Tensor],
    src: Sequence[torch.Tensor],
    dst_ids: Ids,
    src_ids: Ids,
    *,
    non_blocking: bool = False,
) -> None:
    """Copy block ``src_ids[i]`` of ``src[t]`` to block ``dst_ids[i]`` of ``dst[t]``, one way.

    Args:
        dst: Tensors written.
        src: As many tensors of the same block size; their pitch may differ.
        dst_ids: Blocks written, [n], all different.
        src_ids: Blocks read, [n].
        non_blocking: Leave the copies on the device's current stream.

    Raises:
        IndexError: An id out of range, with its position.
        ValueError: A repeated destination, blocks that share memory, or lists that don't fit each
            other.
    """
    to_ids, from_ids = as_ids(dst_ids, "dst_ids"), as_ids(src_ids, "src_ids")
    _ops.swap_blocks(list(dst), list(src), to_ids, from_ids, non_blocking=non_blocking)
    if non_blocking:
        streams.keep_host_tensors([*dst, *src])


def copy_rows(
    dst: Sequence[torch.Tensor],
    src: Sequence[torch.Tensor],
    dst_row: int,
    src_row: int,
    offset: int,
    nbytes: int,
    *,
    non_blocking: bool = False,
) -> None:
    """Copy bytes ``[offset, offset + nbytes)`` of one row to the same place of another, per tensor.

    Args:
        dst: Tensors written; may be the tensors of `src`.
        src: As many tensors; dtype and shape need not match.
        dst_row: Row written.
        src_row: Row read.
        offset: First byte within both rows.
        nbytes: Bytes per tensor.
        non_blocking: Leave the copies on the device's current stream.

    Raises:
        IndexError: A row out of range.
        ValueError: Bytes that don't fit one of the rows, or rows that share memory in part.
    """
    if not dst and not src:
        return  # without a tensor there is no device to dispatch to
    _ops.copy_rows(
        list(dst), list(src), dst_row, src_row, offset, nbytes, non_blocking=non_blocking
    )
    if non_blocking:
        streams.keep_host_tensors([*dst, *src])


def _writes_in_place(*arguments: object, non_blocking: bool = False) -> None:
    """The fake kernel of every op here: it returns nothing, so there is no shape to work out."""


for _name in ("copy_blocks", "swap_blocks", "copy_rows"):
    torch.library.register_fake(f"llm_datadist_torch::{_name}", _writes_in_place)
