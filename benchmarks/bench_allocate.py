# SPDX-License-Identifier: Apache-2.0
"""allocate_cache of 80 tensors against 80 calls of torch.empty, and the memory that it really
takes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from llm_datadist_torch import CacheDesc, CacheManager, DataType, LLMConfig, LLMDataDist, LLMRole

TENSORS = 80
GOAL = 1.5
SLACK = TENSORS * 64 * common.KIB + 2 * common.KIB**2


def start_instance(cluster_id: int, pool_bytes: int) -> LLMDataDist:
    config = LLMConfig()
    config.enable_cache_manager = True
    if pool_bytes:
        config.mem_pool_cfg = f'{{"memory_size": {pool_bytes}}}'
    datadist = LLMDataDist(LLMRole.MIX, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def allocate_and_free(manager: CacheManager, desc: CacheDesc) -> None:
    manager.deallocate_cache(manager.allocate_cache(desc))


def resident_bytes() -> int:
    """Resident memory of this process: private and shared pages."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * common.KIB for line in lines if line.startswith("VmRSS"))


def measure_speed(kib: int, rounds: int) -> dict[str, Any]:
    """Allocate and free, in microseconds."""
    desc = CacheDesc(TENSORS, [8, kib * common.KIB // 8], DataType.DT_UINT8)
    bare, pooled = start_instance(1, 0), start_instance(2, 2 * TENSORS * kib * common.KIB)

    def torch_empty() -> None:
        tensors = [torch.empty(8, kib * common.KIB // 8, dtype=torch.uint8) for _ in range(TENSORS)]
        del tensors

    calls: dict[str, Callable[[], object]] = {
        "torch.empty": torch_empty,
        "allocate_cache": lambda: allocate_and_free(bare.cache_manager, desc),
        "from a pool": lambda: allocate_and_free(pooled.cache_manager, desc),
    }
    times = common.interleaved(calls, rounds, warmups=20)
    bare.finalize()
    pooled.finalize()
    medians = {name: statistics.median(seconds) * 1e6 for name, seconds in times.items()}
    return {
        "tensor_kib": kib,
        "tensors": TENSORS,
        "rounds": rounds,
        "median_us": medians,
        "allocate_to_empty": medians["allocate_cache"] / medians["torch.empty"],
        "pool_to_empty": medians["from a pool"] / medians["torch.empty"],
    }


def measure_memory(kib: int) -> dict[str, Any]:
    """Resident bytes of a cache whose every byte has been written, beyond the bytes asked for."""
    asked = TENSORS * kib * common.KIB
    datadist = start_instance(1, 0)
    before = resident_bytes()
    desc = CacheDesc(TENSORS, [8, kib * common.KIB // 8], DataType.DT_UINT8)
    cache = datadist.cache_manager.allocate_cache(desc)
    for tensor in cache.tensors:
        tensor.fill_(1)
    extra = resident_bytes() - before - asked
    datadist.finalize()
    return {"tensor_kib": kib, "asked_bytes": asked, "extra_bytes": extra, "allowed_bytes": SLACK}


def main() -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kib", type=int, nargs="+", default=[64, 1024, 16384])
    parser.add_argument("--rounds", type=int, default=301)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()

    common.print_environment()
    print(f"{TENSORS} tensors, allocated and freed; medians of {options.rounds}, microseconds;")
    print(f"ratios to torch.empty; goal: allocate_cache at most {GOAL}, from a pool below it")
    print("tensor KiB  torch.empty  allocate_cache  from a pool   ratio  pool ratio")
    results = []
    for kib in options.kib:
        result = measure_speed(kib, options.rounds)
        results.append(result)
        medians = result["median_us"]
        met = result["allocate_to_empty"] <= GOAL and result["pool_to_empty"] < GOAL
        print(
            f"{kib:10} {medians['torch.empty']:12.0f} {medians['allocate_cache']:15.0f}"
            f" {medians['from a pool']:12.0f} {result['allocate_to_empty']:7.2f}"
            f" {result['pool_to_empty']:11.2f}  {'met' if met else 'MISSED'}",
            flush=True,
        )
    print("tensor KiB        asked  extra resident  allowed")
    for kib in options.kib:
        result = measure_memory(kib)
        results.append(result)
        met = result["extra_bytes"] <= result["allowed_bytes"]
        print(
            f"{kib:10} {result['asked_bytes']:12} {result['extra_bytes']:15}"
            f" {result['allowed_bytes']:8}  {'met' if met else 'MISSED'}"
        )
    common.save(options.json, results)


if __name__ == "__main__":
    main()
