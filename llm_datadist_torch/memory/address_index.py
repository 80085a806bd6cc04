# SPDX-License-Identifier: Apache-2.0
"""Finding what lies at an address, among tens of thousands of things."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

_T = TypeVar("_T")

_SHIFT = 21
"""Granules of 2 MiB: an allocated cache starts at such a boundary, and shares none with others."""


class AddressIndex(Generic[_T]):
    """Which items touch which granule of the address space.

    Adding costs a dictionary entry, about 150 bytes, per granule; looking costs the same however
    many items there are elsewhere.

    Thread safety: none; its user locks.
    """

    def __init__(self) -> None:
        self._items: dict[int, tuple[_T, ...]] = {}

    def add(self, item: _T, starts: Iterable[int], nbytes: int) -> None:
        """The item has ``nbytes`` bytes, at least 1, at each of these addresses."""
        for granule in _granules(starts, nbytes):
            self._items[granule] = (*self._items.get(granule, ()), item)

    def remove(self, item: _T, starts: Iterable[int], nbytes: int) -> None:
        """Undo :meth:`add`, which must have been called with the same arguments."""
        for granule in _granules(starts, nbytes):
            left = tuple(other for other in self._items[granule] if other is not item)
            if left:
                self._items[granule] = left
            else:
                del self._items[granule]

    def near(self, address: int) -> Sequence[_T]:
        """All items that have the byte at ``address``, and some that lie near it, in order."""
        return self._items.get(address >> _SHIFT, ())

    def clear(self) -> None:
        """Forget all items."""
        self._items.clear()

    def __len__(self) -> int:
        """Granules that something touches."""
        return len(self._items)


def _granules(starts: Iterable[int], nbytes: int) -> set[int]:
    found: set[int] = set()
    for start in starts:
        found.update(range(start >> _SHIFT, ((start + nbytes - 1) >> _SHIFT) + 1))
    return found
