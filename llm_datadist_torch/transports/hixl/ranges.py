# SPDX-License-Identifier: Apache-2.0
"""Registered ranges of one engine, ours or a peer's, to look addresses up in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class RegisteredRange(NamedTuple):
    """One range.

    Attributes:
        address: Its start in its owner's process.
        nbytes: Its size.
        generation: Number of the registration, counted per engine: connections that are older
            don't reach it.
    """

    address: int
    nbytes: int
    generation: int


class RangeTable:
    """Ranges that don't overlap. Immutable.

    Args:
        ranges: In any order.
    """

    def __init__(self, ranges: Iterable[RegisteredRange] = ()) -> None:
        order = sorted(ranges)
        self._starts = torch.tensor([one.address for one in order], dtype=torch.int64)
        self._ends = torch.tensor([one.address + one.nbytes for one in order], dtype=torch.int64)
        self._generations = torch.tensor([one.generation for one in order], dtype=torch.int64)

    def generation_of(self, addrs: torch.Tensor, nbytes: int) -> int | None:
        """The latest generation among the ranges that hold some bytes.

        Args:
            addrs: Where the bytes begin, int64 [n], n > 0.
            nbytes: How many there are at each.

        Returns:
            None if not each of these stretches lies inside one range.
        """
        if not len(self._starts):
            return None
        at = (torch.searchsorted(self._starts, addrs, right=True) - 1).clamp(min=0)
        if not bool(((addrs >= self._starts[at]) & (addrs + nbytes <= self._ends[at])).all()):
            return None
        return int(self._generations[at].max())
