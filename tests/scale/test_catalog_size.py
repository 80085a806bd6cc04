# SPDX-License-Identifier: Apache-2.0
"""10,000 caches and 1,000,000 keys: what a catalog is asked costs what it costs a small one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from llm_datadist_torch import CacheKey, LLMCacheNotFoundError, LLMParamError
from llm_datadist_torch.caches.address_index import AddressIndex
from llm_datadist_torch.caches.catalog import Catalog
from llm_datadist_torch.caches.entry import CacheEntry, KeyKind, KeyName
from llm_datadist_torch.values.layout import layout_of

pytestmark = pytest.mark.thorough

ROWS, TENSORS, ROW_BYTES = 100, 2, 1 << 14
APART = 1 << 22
"""Bytes from one cache to the next; each has 3.1 MiB."""
BASE = 1 << 40


def name(cache: int, row: int) -> KeyName:
    return KeyName(KeyKind.REQUEST, cache * ROWS + row, 0)


def filled(count: int) -> Catalog:
    """Caches with the ids 1 to ``count``, a key for each row."""
    catalog = Catalog()
    layout = layout_of(TENSORS, [ROWS, ROW_BYTES], ROWS * ROW_BYTES, paged=False)
    tensors = (torch.empty(0),)
    offsets = torch.arange(TENSORS) * ROWS * ROW_BYTES
    for number in range(count):
        addrs = BASE + number * APART + offsets
        entry = CacheEntry(catalog.next_id(), layout, tensors, addrs, True, True)
        catalog.add(entry, [CacheKey(1, number * ROWS + row) for row in range(ROWS)])
    return catalog


@pytest.fixture(scope="module")
def large() -> Catalog:
    return filled(10_000)


def steps(call: Callable[[], object]) -> int:
    """Lines of Python that a call runs through, in the library and in what it calls."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_what_it_holds(large: Catalog) -> None:
    assert (len(large), large.num_keys) == (10_000, 1_000_000)
    for number in (0, 4_999, 9_999):
        found = large.resolve_key(name(number, 42))
        assert (found.entry.cache_id, found.row) == (number + 1, 42)
        address = BASE + number * APART + ROW_BYTES * ROWS + 5
        assert large.resolve_address(address).entry is found.entry
    with pytest.raises(LLMCacheNotFoundError):
        large.resolve_key(name(10_000, 0))
    for outside in (BASE - 1, BASE + APART - 1, BASE + 10_000 * APART):
        with pytest.raises(LLMParamError, match="no cache contains the address"):
            large.resolve_address(outside)


ASKED: dict[str, Callable[[Catalog], object]] = {
    "key": lambda catalog: catalog.resolve_key(name(3, 7)),
    "id": lambda catalog: catalog.resolve_id(3, 7),
    "address": lambda catalog: catalog.resolve_address(BASE + 3 * APART),
    "lease": lambda catalog: catalog.acquire(catalog.find(3)).release(),
    "consume": lambda catalog: catalog.consume(catalog.find(9), name(8, 7), range(TENSORS)),
    "remove a key": lambda catalog: catalog.remove_key(name(4, 9)),
    "let go of a cache": lambda catalog: catalog.release_id(6),
    "end of a cache": lambda catalog: [catalog.remove_key(name(5, row)) for row in range(ROWS)],
}


def test_what_is_asked_does_not_depend_on_how_much_there_is(large: Catalog) -> None:
    small = filled(10)
    assert {what: steps(lambda call=call: call(large)) for what, call in ASKED.items()} == {
        what: steps(lambda call=call: call(small)) for what, call in ASKED.items()
    }
    assert (len(large), len(small)) == (9_999, 9)
    assert small.num_keys == 10 * ROWS - 2 - ROWS


def test_the_index_of_addresses() -> None:
    index: AddressIndex[str] = AddressIndex()
    mib = 1 << 20
    # Addresses from 2**63 on are negative int64.
    index.add("a", [0, 5 * mib], mib)
    index.add("b", [-mib], 2 * mib)
    index.add("c", [4 * mib], 4 * mib)
    assert [sorted(index.near(at)) for at in (-1, 0, 2 * mib, 4 * mib, 7 * mib)] == [
        ["b"], ["a", "b"], [], ["a", "c"], ["c"],
    ]  # fmt: skip
    index.remove("a", [0, 5 * mib], mib)
    assert [index.near(at) for at in (0, 5 * mib)] == [["b"], ["c"]]
    index.remove("b", [-mib], 2 * mib)
    index.remove("c", [4 * mib], 4 * mib)
    assert len(index) == 0


def test_large_caches_are_entered_as_fast_as_small_ones() -> None:
    def added_and_removed(nbytes: int) -> int:
        index: AddressIndex[str] = AddressIndex()
        starts = [BASE + at * nbytes for at in range(64)]

        def call() -> None:
            index.add("kv", starts, nbytes)
            assert list(index.near(starts[7] + nbytes - 1)) == ["kv"]
            index.remove("kv", starts, nbytes)

        return steps(call)

    small, large = added_and_removed(1 << 21), added_and_removed(1 << 30)
    assert abs(small - large) < small / 2, (small, large)
