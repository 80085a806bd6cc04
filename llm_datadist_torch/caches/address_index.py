# SPDX-License-Identifier: Apache-2.0
"""Finding what lies at an address, among tens of thousands of things."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

_T = TypeVar("_T")

_SMALLEST = 21
"""Granules of 2 MiB at least: an allocated cache starts at such a boundary, and shares none."""


class AddressIndex(Generic[_T]):
    """Which items touch which granule of the address space.

    An item is entered in granules at least as large as each of its stretches, so each stretch
    touches two of them at most: adding and removing cost the same whatever the size of an item.
    Looking asks once per size of granules in use, of which there are 43 at most, and costs the same
    however many items there are elsewhere.

    Thread safety: none; its user locks.
    """

    def __init__(self) -> None:
        self._items: dict[tuple[int, int], tuple[_T, ...]] = {}
        self._shifts: Counter[int] = Counter()

    def add(self, item: _T, starts: Iterable[int], nbytes: int) -> None:
        """The item has ``nbytes`` bytes, at least 1, at each of these addresses."""
        for granule in _granules(starts, nbytes):
            self._items[granule] = (*self._items.get(granule, ()), item)
            self._shifts[granule[0]] += 1

    def remove(self, item: _T, starts: Iterable[int], nbytes: int) -> None:
        """Undo :meth:`add`, which must have been called with the same arguments."""
        for granule in _granules(starts, nbytes):
            left = tuple(other for other in self._items[granule] if other is not item)
            if left:
                self._items[granule] = left
            else:
                del self._items[granule]
            self._shifts[granule[0]] -= 1
            if not self._shifts[granule[0]]:
                del self._shifts[granule[0]]

    def near(self, address: int) -> Sequence[_T]:
        """All items that have the byte at ``address``, and some that lie near it."""
        return [
            item
            for shift in self._shifts
            for item in self._items.get((shift, address >> shift), ())
        ]

    def clear(self) -> None:
        """Forget all items."""
        self._items.clear()
        self._shifts.clear()

    def __len__(self) -> int:
        """Granules that something touches."""
        return len(self._items)


def _granules(starts: Iterable[int], nbytes: int) -> set[tuple[int, int]]:
    shift = max(_SMALLEST, (nbytes - 1).bit_length())
    found: set[tuple[int, int]] = set()
    for start in starts:
        found.add((shift, start >> shift))
        found.add((shift, (start + nbytes - 1) >> shift))
    return found
