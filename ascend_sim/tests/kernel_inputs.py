# SPDX-License-Identifier: Apache-2.0
"""What the simulator's kernels are compared on: the same expression on the CPU and on `npu:0`.

A case is a function of `Inputs`, called with the inputs of either device.  This needs torch only,
so that pytest can list the cases where torch_npu is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

ROWS, COLUMNS = 4, 6

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SINGLE = (torch.float32,)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPLEX = (torch.complex64,)
BOOL = (torch.bool,)
NUMBERS = FLOATS + INTEGERS
ALL = (*NUMBERS, torch.float64, torch.bool)

# torch_npu itself makes float32 of float64 in a cast on a device.
CASTS = (*NUMBERS, torch.bool)

LAYOUTS = ("contiguous", "transposed", "sliced")


class Inputs:
    """Tensors of one type and layout, on one device.

    The numbers are small and not symmetric, so that they are exact in all types, and that an
    operand too many or in the wrong place shows.
    """

    def __init__(self, device: str, dtype: torch.dtype, layout: str) -> None:
        self.device = device
        self.dtype = dtype
        self._layout = layout

    def make(self, values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns the values as a tensor of the layout, on the device."""
        values = values.to(self.dtype if dtype is None else dtype)
        if self._layout == "contiguous" or values.dim() == 0:
            return values.to(self.device)
        if self._layout == "transposed":
            return (
                values.T.contiguous().to(self.device).T if values.dim() == 2 else self.gaps(values)
            )
        return self.gaps(values)

    def gaps(self, values: torch.Tensor) -> torch.Tensor:
        """Returns every second element of the last dimension of something larger."""
        shape = (*values.shape[:-1], 2 * values.shape[-1] + 1)
        wide = torch.full(shape, 1, dtype=values.dtype)
        wide[..., 1::2] = values
        return wide.to(self.device)[..., 1::2]

    def numbers(self, *shape: int, start: int = 1, step: int = 3, modulo: int = 11) -> torch.Tensor:
        """Returns small numbers in an irregular order; negative ones too, where there are any."""
        count = math.prod(shape)
        values = (torch.arange(count, dtype=torch.int64) * step + start) % modulo
        if self.dtype.is_signed:
            values = values - 4 * (values % 2)
        return self.make(values.reshape(shape))

    def index(self, *values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Returns these integers."""
        return self.make(torch.tensor(values), dtype)

    @property
    def x(self) -> torch.Tensor:
        """[4, 6]."""
        return self.numbers(ROWS, COLUMNS)

    @property
    def y(self) -> torch.Tensor:
        """[4, 6], none of them 0."""
        values = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 5 % 7 + 1
        return self.make(values)

    @property
    def row(self) -> torch.Tensor:
        """[6], none of them 0."""
        return self.y[1]

    @property
    def unit(self) -> torch.Tensor:
        """[4, 6] from 0.05 to 0.9."""
        values = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 7 % 24 / 27 + 0.05
        return self.make(values)

    @property
    def mask(self) -> torch.Tensor:
        """[4, 6] of bool."""
        values = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 5 % 7 < 3
        return self.make(values, torch.bool)

    @property
    def options(self) -> dict[str, Any]:
        """For factory functions."""
        return {"device": self.device, "dtype": self.dtype}


@dataclass(frozen=True)
class Case:
    """One expression, and the types to try it with."""

    name: str
    function: Callable[[Inputs], Any]
    dtypes: Sequence[torch.dtype] = FLOATS
    layouts: Sequence[str] = LAYOUTS
    tolerance: dict[torch.dtype, float] = field(
        default_factory=lambda: {
            torch.float64: 1e-6,
            torch.float32: 1e-5,
            torch.complex64: 1e-5,
            torch.float16: 4e-3,
            torch.bfloat16: 2e-2,
        }
    )


def changed(tensor: torch.Tensor, change: Callable[[torch.Tensor], object]) -> torch.Tensor:
    """Applies a change in place, and returns the tensor."""
    change(tensor)
    return tensor
