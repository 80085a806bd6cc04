# SPDX-License-Identifier: Apache-2.0
"""copy_blocks and swap_blocks against a Python loop, torch's index ops, and one large memcpy.

Everything is measured in turn in one process; figures are medians in GB/s of payload. The memcpy
baseline is the C library's, called through ctypes on as many bytes in one contiguous piece, by one
thread and split over two to as many as there are cores; the best of these counts.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from llm_datadist_torch import ops

BLOCKS = 128  # moved per tensor and call
POOL = 2 * BLOCKS  # blocks per tensor
MEMORY_LIMIT = 5 << 30  # for both sides together
COLUMNS = ("copy_blocks", "swap_blocks", "loop", "index ops", "memcpy")
GOALS = {4: 0.6, 16: 0.8, 64: 0.8, 256: 0.9, 1024: 0.9}

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.memcpy.restype = ctypes.c_void_p


@dataclass(frozen=True)
class Case:
    """One point of the sweep.

    Attributes:
        block_bytes: Size of a block.
        run: Adjacent blocks per run; 1 is fully scattered.
        tensors: Tensors per list; fewer where they would exceed MEMORY_LIMIT.
    """

    block_bytes: int
    run: int
    tensors: int

    @property
    def nbytes(self) -> int:
        return self.tensors * BLOCKS * self.block_bytes


def region(case: Case) -> list[torch.Tensor]:
    """One side's tensors in one touched region; huge pages asked for, as the library does."""
    total = case.tensors * POOL * case.block_bytes
    align = 2 << 20
    raw = torch.empty(total + align, dtype=torch.uint8)
    start = -raw.data_ptr() % align
    _libc.madvise(ctypes.c_void_p(raw.data_ptr() + start), ctypes.c_size_t(total), 14)
    memory = raw[start : start + total].fill_(1)
    # float32, because torch's index ops are slower on bytes.
    return list(memory.view(torch.float32).view(case.tensors, POOL, -1).unbind(0))


def block_ids(case: Case, seed: int, half: int) -> torch.Tensor:
    """BLOCKS shuffled block ids of one half of the pool, in runs of `case.run`."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(BLOCKS // case.run, generator=generator) * case.run + half * BLOCKS
    return (starts[:, None] + torch.arange(case.run)).flatten()


def memcpy_calls(dst: int, src: int, nbytes: int) -> dict[str, Callable[[], object]]:
    """One large memcpy by 1 .. cores threads; the warm-up round starts the threads."""
    calls: dict[str, Callable[[], object]] = {}
    for threads in range(1, len(os.sched_getaffinity(0)) + 1):
        share = nbytes // threads
        parts = [(dst + i * share, src + i * share, share) for i in range(threads)]
        pool = ThreadPoolExecutor(threads)

        def call(
            parts: list[tuple[int, int, int]] = parts, pool: ThreadPoolExecutor = pool
        ) -> object:
            if len(parts) == 1:
                return _libc.memcpy(*parts[0])
            return [f.result() for f in [pool.submit(_libc.memcpy, *part) for part in parts]]

        calls[f"memcpy x{threads}"] = call
    return calls


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """All contenders of one case, interleaved."""
    src, dst = region(case), region(case)
    src_ids, dst_ids = block_ids(case, 1, 0), block_ids(case, 2, 1)
    pairs = list(zip(src_ids.tolist(), dst_ids.tolist(), strict=True))

    def loop() -> None:
        for d, s in zip(dst, src, strict=True):
            for i, j in pairs:
                d[j].copy_(s[i])

    def index_ops(threads: int) -> None:
        default = torch.get_num_threads()
        torch.set_num_threads(threads)
        for d, s in zip(dst, src, strict=True):
            d.index_copy_(0, dst_ids, s.index_select(0, src_ids))
        torch.set_num_threads(default)

    calls: dict[str, Callable[[], object]] = {
        "copy_blocks": lambda: ops.copy_blocks(dst, src_ids, dst_ids),
        "swap_blocks": lambda: ops.swap_blocks(dst, src, dst_ids, src_ids),
        "loop": loop,
    }
    index = {f"index ops x{n}": partial(index_ops, n) for n in {1, torch.get_num_threads()}}
    memcpy = memcpy_calls(dst[0].data_ptr(), src[0].data_ptr(), case.nbytes)
    times = common.interleaved({**calls, **index, **memcpy}, rounds)
    rates = {name: common.gb_per_s(case.nbytes, times[name]) for name in times}
    best = max(memcpy, key=lambda name: rates[name])
    rates["memcpy"] = rates[best]
    rates["index ops"] = max(rates[name] for name in index)
    return {
        "block_kib": case.block_bytes // common.KIB,
        "run": case.run,
        "tensors": case.tensors,
        "bytes": case.nbytes,
        "rounds": rounds,
        "gb_per_s": rates,
        "best_memcpy": best,
        "copy_to_memcpy": rates["copy_blocks"] / rates["memcpy"],
        "swap_to_memcpy": rates["swap_blocks"] / rates["memcpy"],
        "swap_to_loop": rates["swap_blocks"] / rates["loop"],
        "swap_to_index": rates["swap_blocks"] / rates["index ops"],
    }


def print_row(result: dict[str, Any]) -> None:
    """One line of the table."""
    rates = result["gb_per_s"]
    cells = " ".join(f"{rates[name]:11.2f}" for name in COLUMNS)
    kib = result["block_kib"]
    goal = GOALS.get(kib)
    met = ""
    if goal is not None:
        worst = min(result["copy_to_memcpy"], result["swap_to_memcpy"])
        met = f"{goal:.1f} {'met' if worst >= goal else 'MISSED'}"
    print(
        f"{kib:5} {result['run']:4} {result['tensors']:8} {cells}"
        f"  {result['copy_to_memcpy']:5.2f} {result['swap_to_memcpy']:5.2f}"
        f" {result['swap_to_loop']:6.2f} {result['swap_to_index']:6.2f}  {met}",
        flush=True,
    )


def main() -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kib", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()

    common.print_environment()
    print(f"{BLOCKS} of {POOL} blocks per tensor; GB/s of payload, medians of {options.rounds};")
    print("64 tensors, fewer where both sides would exceed 5 GiB; ratios: copy and swap to memcpy,")
    print("swap to loop, swap to index ops; memcpy and index ops with their best thread count")
    print(
        f"  KiB  run  tensors {' '.join(f'{c:>11}' for c in COLUMNS)}   c/mem s/mem s/loop  s/idx"
    )
    results = []
    for kib in options.kib:
        block_bytes = kib * common.KIB
        tensors = min(64, MEMORY_LIMIT // (2 * POOL * block_bytes))
        for run in (1, 16):
            results.append(measure(Case(block_bytes, run, tensors), options.rounds))
            print_row(results[-1])
    common.save(options.json, results)


if __name__ == "__main__":
    main()
