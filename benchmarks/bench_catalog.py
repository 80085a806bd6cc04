# SPDX-License-Identifier: Apache-2.0
"""What a catalog costs: adding caches with their keys, finding and removing them, memory per key.

Caches without memory, because it is the tables that are measured: ``allocate_cache`` adds to this
what ``bench alloc`` shows."""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from llm_datadist_torch import CacheKey
from llm_datadist_torch.caches.catalog import Catalog
from llm_datadist_torch.caches.entry import CacheEntry, KeyKind, KeyName
from llm_datadist_torch.values.layout import layout_of

ROWS, TENSORS, ROW_BYTES = 100, 80, 1 << 14
NBYTES = ROWS * TENSORS * ROW_BYTES
BASE = 1 << 40
ASKED = 5000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def p50_us(call: Callable[[int], object], numbers: Iterable[int]) -> float:
    """Median microseconds of a call with each of the numbers."""
    times = []
    for number in numbers:
        start = time.perf_counter()
        call(number)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def name(number: int) -> KeyName:
    return KeyName(KeyKind.REQUEST, number, 0)


def measure(caches: int) -> dict[str, Any]:
    """A catalog of so many caches, each of 100 rows with a key."""
    catalog, layout = (
        Catalog(),
        layout_of(TENSORS, [ROWS, ROW_BYTES], ROWS * ROW_BYTES, paged=False),
    )
    offsets = torch.arange(TENSORS) * ROWS * ROW_BYTES
    gc.collect()
    before, adds = resident(), []
    for number in range(caches):
        entry = CacheEntry(
            catalog.next_id(), layout, (), BASE + number * NBYTES + offsets, True, True
        )
        keys = [CacheKey(1, number * ROWS + row) for row in range(ROWS)]
        start = time.perf_counter()
        catalog.add(entry, keys)
        adds.append(time.perf_counter() - start)
        del keys
    gc.collect()
    memory, rng = resident() - before, random.Random(1)
    some = rng.sample(range(caches * ROWS), min(ASKED, caches * ROWS // 2))
    return {
        "caches": caches,
        "keys": catalog.num_keys,
        "bytes_per_key": memory / catalog.num_keys,
        "add_us_per_key": statistics.median(adds) / ROWS * 1e6,
        "find_by_key_us": p50_us(lambda number: catalog.resolve_key(name(number)), some),
        "find_by_id_us": p50_us(
            lambda number: catalog.resolve_id(number // ROWS + 1, number % ROWS), some
        ),
        "find_by_address_us": p50_us(
            lambda number: catalog.resolve_address(BASE + number // ROWS * NBYTES), some[:500]
        ),
        "remove_key_us": p50_us(lambda number: catalog.remove_key(name(number)), some),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--caches", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common.print_environment()
    results = [measure(caches) for caches in args.caches]
    for result in results:
        print(", ".join(f"{name} {value:,.1f}" for name, value in result.items()))
    common.save(args.json, results)


if __name__ == "__main__":
    main()
