# SPDX-License-Identifier: Apache-2.0
"""Finding what lies at an address, among tens of thousands of things."""

from __future__ import annotations

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

    Ctrl-C in the middle of a change leaves others' items found, and :meth:`remove` can be called
    again.

    Thread safety: none; its user locks.
    """

    def __init__(self) -> None:
        self._items: dict[int, dict[int, tuple[_T, ...]]] = {}

    def add(self, item: _T, starts: Iterable[int], nbytes: int) -> None:
        """The item has ``nbytes`` bytes, at least 1, at each of these addresses."""
        for shift, number in _granules(starts, nbytes):
            table = self._items.setdefault(shift, {})
            table[number] = (*table.get(number, ()), item)

    def remove(self, item: _T, starts: Iterable[int], nbytes: int) -> None:
        """Undo :meth:`add` with the same arguments, as far as it was done."""
        for shift, number in _granules(starts, nbytes):
            table = self._items.get(shift, {})
            left = tuple(other for other in table.get(number, ()) if other is not item)
            if left:
                table[number] = left
            else:
                table.pop(number, None)
            if not table:
                self._items.pop(shift, None)

    def near(self, address: int) -> Sequence[_T]:
        """All items that have the byte at ``address``, and some that lie near it."""
        return [
            item for shift, table in self._items.items() for item in table.get(address >> shift, ())
        ]

    def clear(self) -> None:
        """Forget all items."""
        self._items.clear()

    def __len__(self) -> int:
        """Granules that something touches."""
        return sum(map(len, self._items.values()))


def _granules(starts: Iterable[int], nbytes: int) -> set[tuple[int, int]]:
    shift = max(_SMALLEST, (nbytes - 1).bit_length())
    found: set[tuple[int, int]] = set()
    for start in starts:
        found.add((shift, start >> shift))
        found.add((shift, (start + nbytes - 1) >> shift))
    return found
