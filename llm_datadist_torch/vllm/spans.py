# SPDX-License-Identifier: Apache-2.0
"""Rows of tensors as bytes, whatever the order of their dimensions in memory."""

from __future__ import annotations

import torch


def memory_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions of a row of ``[rows, ...]`` in the order in which they lie in memory.

    Returns:
        Dimensions from 1 on, outermost first; None if a row is not one dense piece.
    """
    sizes, strides = tensor.shape, tensor.stride()
    order = sorted(range(1, tensor.dim()), key=lambda at: (-strides[at], at))
    expected = 1
    for at in reversed(order):
        if sizes[at] != 1 and strides[at] != expected:
            return None
        expected *= sizes[at]
    # Where a dimension has one element its stride means nothing: the natural order is kept.
    real = [at for at in order if sizes[at] != 1]
    if real == sorted(real):
        return tuple(range(1, tensor.dim()))
    return tuple(order)


def flat_rows(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 ``[rows, bytes]``: the rows as they lie in memory; only dimension 0 may be strided."""
    count = tensor[0].numel()
    row_stride = tensor.stride(0) if tensor.shape[0] > 1 else count
    flat = tensor.as_strided((tensor.shape[0], count), (row_stride, 1))
    return flat.view(torch.uint8)
