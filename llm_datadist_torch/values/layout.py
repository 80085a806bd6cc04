# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a cache lie in its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_datadist_torch.values.checks import param_error

MAX_DIMS = 31


@dataclass(frozen=True)
class Layout:
    """Where the rows (or blocks) of a cache lie, the same in each of its tensors.

    Attributes:
        num_tensors: Tensors in the cache.
        rows: Rows (batch) of a contiguous cache, blocks of a blocks cache: ``shape[0]``.
        row_bytes: Bytes of one row or block; the *stride* of the reference API (8.1).
        row_stride_bytes: Bytes between the starts of two rows; larger than ``row_bytes`` where a
            registered tensor is a strided view.
        paged: Whether it is a blocks cache.
    """

    num_tensors: int
    rows: int
    row_bytes: int
    row_stride_bytes: int
    paged: bool

    @property
    def extent(self) -> int:
        """Bytes from the start of a tensor's first row to the end of its last."""
        return (self.rows - 1) * self.row_stride_bytes + self.row_bytes

    def tensor_at(self, addrs: torch.Tensor, address: int) -> int | None:
        """Index of the tensor that has the byte at ``address`` in one of its rows, or None.

        Args:
            addrs: Addresses of the tensors, int64 [num_tensors].
            address: int64; an address above that range is given as a negative number, as there.
        """
        offsets = address - addrs
        inside = (
            (offsets >= 0)
            & (offsets < self.extent)
            & (offsets % self.row_stride_bytes < self.row_bytes)
        )
        found = inside.nonzero()
        return int(found[0]) if len(found) else None

    @property
    def unit(self) -> str:
        """What this cache is cut into, for messages."""
        return "block" if self.paged else "row"


def layout_of(num_tensors: int, shape: Sequence[int], tensor_bytes: int, *, paged: bool) -> Layout:
    """The layout of densely packed tensors of ``shape``.

    Dimension 0 is the batch or the blocks (reference API, 8.1).

    Args:
        num_tensors: Tensors in the cache, at least 1.
        shape: Shape of one tensor.
        tensor_bytes: Bytes of one tensor.
        paged: Whether it is a blocks cache.

    Raises:
        LLMParamError: No tensors, or more than 31 dimensions.
    """
    if num_tensors < 1:
        raise param_error(f"num_tensors={num_tensors}, but a cache needs at least 1 tensor")
    if not 1 <= len(shape) <= MAX_DIMS:
        raise param_error(f"shape has {len(shape)} dimensions, supported are 1 to {MAX_DIMS}")
    row_bytes = tensor_bytes // shape[0]
    return Layout(num_tensors, shape[0], row_bytes, row_bytes, paged)
