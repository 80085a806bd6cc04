# SPDX-License-Identifier: Apache-2.0
"""Copies between tensors as torch ops: typed wrappers; the kernels are in op_kernels.py.

In every op dimension 0 of a tensor is its row or block. Tensors may be strided in dimension 0
(views with gaps), each row must be contiguous. Everything is checked before the first byte moves,
and the GIL is released while bytes move.

On a device everything happens on its current stream, in order with other work there. The calls
return when all bytes are there; with ``non_blocking`` they leave the copies on the stream, and keep
what these need alive. Tensors of one call are in host memory, or on one device. Page-locked host
memory is copied asynchronously, other host memory before the return.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_datadist_torch.memory import streams
from llm_datadist_torch.movement import (
    op_kernels as op_kernels,  # registers torch.ops.llm_datadist_torch
)
from llm_datadist_torch.values.checks import Ids
from llm_datadist_torch.values.checks import as_ids as as_ids

_ops = torch.ops.llm_datadist_torch


def copy_blocks(
    tensors: Sequence[torch.Tensor], src_ids: Ids, dst_ids: Ids, *, non_blocking: bool = False
) -> None:
    """Copy block ``src_ids[i]`` to block ``dst_ids[i]`` in each tensor.

    Every destination gets what its source held before the call, also in chains, fans and cycles.

    Args:
        tensors: Tensors of equal block size and row stride, written in place.
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
        src: As many tensors of the same block size; their row stride may differ.
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
