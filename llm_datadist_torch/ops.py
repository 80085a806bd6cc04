# SPDX-License-Identifier: Apache-2.0
"""Copies between tensors as torch ops: typed wrappers, and the fakes that torch.compile needs.

In every op dimension 0 of a tensor is its row or block. Tensors may be strided in dimension 0
(views with gaps), each row must be contiguous. Everything is checked before the first byte moves,
and the GIL is released while bytes move.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeAlias

import torch

from llm_datadist_torch import _C as _C  # registers torch.ops.llm_datadist_torch

Ids: TypeAlias = "Sequence[int] | torch.Tensor"

_ops = torch.ops.llm_datadist_torch
_NO_IDS = torch.empty(0, dtype=torch.int64)


def as_ids(ids: Ids, name: str = "ids") -> torch.Tensor:
    """Block ids as a tensor, converted once.

    Args:
        ids: A sequence of ints, or a 1-D integer tensor on any device.
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
    if not all(kind is int for kind in set(map(type, ids))):
        at = next(i for i, value in enumerate(ids) if type(value) is not int)
        raise TypeError(f"{name}[{at}]={ids[at]!r} is a {type(ids[at]).__name__}, expected int")
    try:
        # An array converts a list three times as fast as torch.tensor does.
        values = array("q", ids)
    except OverflowError as error:
        at = next(i for i, value in enumerate(ids) if not -(2**63) <= value < 2**63)
        raise ValueError(f"{name}[{at}]={ids[at]} does not fit in 64 bits") from error
    return torch.frombuffer(values, dtype=torch.int64) if values else _NO_IDS.clone()


def copy_blocks(tensors: Sequence[torch.Tensor], src_ids: Ids, dst_ids: Ids) -> None:
    """Copy block ``src_ids[i]`` to block ``dst_ids[i]`` in each tensor.

    Every destination gets what its source held before the call, also in chains, fans and cycles.
    Returns when all bytes are there.

    Args:
        tensors: Tensors of equal block size and pitch, written in place.
        src_ids: Blocks read, [n].
        dst_ids: Blocks written, [n], all different.

    Raises:
        IndexError: An id out of range, with its position.
        ValueError: A repeated destination, ids of different lengths, or tensors that are cut
            differently or share memory.
    """
    _ops.copy_blocks(list(tensors), as_ids(src_ids, "src_ids"), as_ids(dst_ids, "dst_ids"))


def swap_blocks(
    dst: Sequence[torch.Tensor], src: Sequence[torch.Tensor], dst_ids: Ids, src_ids: Ids
) -> None:
    """Copy block ``src_ids[i]`` of ``src[t]`` to block ``dst_ids[i]`` of ``dst[t]``, one way.

    Returns when all bytes are there.

    Args:
        dst: Tensors written.
        src: As many tensors of the same block size; their pitch may differ.
        dst_ids: Blocks written, [n], all different.
        src_ids: Blocks read, [n].

    Raises:
        IndexError: An id out of range, with its position.
        ValueError: A repeated destination, blocks that share memory, or lists that don't fit each
            other.
    """
    _ops.swap_blocks(list(dst), list(src), as_ids(dst_ids, "dst_ids"), as_ids(src_ids, "src_ids"))


def copy_rows(
    dst: Sequence[torch.Tensor],
    src: Sequence[torch.Tensor],
    dst_row: int,
    src_row: int,
    offset: int,
    nbytes: int,
) -> None:
    """Copy bytes ``[offset, offset + nbytes)`` of one row to the same place of another, per tensor.

    Returns when all bytes are there.

    Args:
        dst: Tensors written; may be the tensors of `src`.
        src: As many tensors; dtype and shape need not match.
        dst_row: Row written.
        src_row: Row read.
        offset: First byte within both rows.
        nbytes: Bytes per tensor.

    Raises:
        IndexError: A row out of range.
        ValueError: Bytes that don't fit one of the rows, or rows that share memory in part.
    """
    if not dst and not src:
        return  # without a tensor there is no device to dispatch to
    _ops.copy_rows(list(dst), list(src), dst_row, src_row, offset, nbytes)


def _writes_in_place(*arguments: object) -> None:
    """The fake kernel of every op here: it returns nothing, so there is no shape to work out."""


for _name in ("copy_blocks", "swap_blocks", "copy_rows"):
    torch.library.register_fake(f"llm_datadist_torch::{_name}", _writes_in_place)
