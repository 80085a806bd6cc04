# SPDX-License-Identifier: Apache-2.0
"""pull_blocks between two processes, against bare C loops that do nothing but move the bytes.

The owner is a process of its own. From an allocated cache the baseline copies the same blocks out
of a shared mapping, one memcpy each; from registered tensors it reads them by process_vm_readv,
1024 per call. The pulls include argument checks, the resolve message and its answer, the lease and
its return. Figures are medians, taken in turn in one process."""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from llm_datadist_torch import (
    _C,
    BlocksCacheKey,
    CacheDesc,
    CacheManager,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
)

BLOCKS = 128  # pulled per tensor and call
POOL = 2 * BLOCKS  # blocks per tensor
MEMORY_LIMIT = 6 << 30  # for the three caches together
OWNER, PULLER = 1, 2
ALLOCATED, REGISTERED = 0, 1  # model ids of the owner's two caches
GOAL = 0.8


@dataclass(frozen=True)
class Case:
    """One point of the sweep: bytes of a block, adjacent blocks per run, tensors of a cache."""

    block_bytes: int
    run: int
    tensors: int

    @property
    def desc(self) -> CacheDesc:
        return CacheDesc(self.tensors, [POOL, self.block_bytes], DataType.DT_UINT8)

    @property
    def nbytes(self) -> int:
        return self.tensors * BLOCKS * self.block_bytes


def start_instance(role: LLMRole, cluster_id: int, *, remote: bool) -> LLMDataDist:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = remote
    config.listen_ip_info = "127.0.0.1:0"
    config.sync_kv_timeout = 60_000
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def own(pipe: Connection, remote: bool) -> None:
    """The owner's process: makes caches as it is told, until it is told None."""
    datadist = start_instance(LLMRole.PROMPT, OWNER, remote=remote)
    manager = datadist.cache_manager
    pipe.send(datadist.listen_address)
    while (case := pipe.recv()) is not None:
        allocated = manager.allocate_blocks_cache(case.desc, BlocksCacheKey(OWNER, ALLOCATED))
        memory = [
            torch.empty(POOL, case.block_bytes, dtype=torch.uint8) for _ in range(case.tensors)
        ]
        registered = manager.register_blocks_cache(
            case.desc, memory, BlocksCacheKey(OWNER, REGISTERED)
        )
        for tensor in (*allocated.tensors, *memory):
            tensor.random_()
        region = datadist._instance.catalog.find(allocated.cache_id).region  # noqa: SLF001
        pipe.send(
            (
                os.getpid(),
                (region.fd, region.inode, region.device, region.nbytes, region.address),
                allocated.tensor_addrs,
                registered.tensor_addrs,
            )
        )
        pipe.recv()
        manager.deallocate_blocks_cache(allocated)
        manager.unregister_cache(registered.cache_id)
        del memory, registered, allocated
        pipe.send("freed")
    datadist.finalize()


def compile_baseline() -> ctypes.CDLL:
    """The C loops, compiled as a release build would be."""
    build = common.ROOT / "build" / "bench"
    build.mkdir(parents=True, exist_ok=True)
    library = build / "baseline.so"
    compiler = shutil.which("cc") or shutil.which("gcc") or "g++"
    source = common.ROOT / "benchmarks" / "baseline.c"
    command = [compiler, "-x", "c", "-O3", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def ids_of(case: Case, seed: int) -> torch.Tensor:
    """BLOCKS shuffled block ids, in runs of ``case.run``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(POOL // case.run, generator=generator)[: BLOCKS // case.run] * case.run
    return (starts[:, None] + torch.arange(case.run)).flatten()


def array(values: list[int] | torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    values = [int(value) for value in values]
    return (ctypes.c_int64 * len(values))(*values)


def measure(
    case: Case, manager: CacheManager, pipe: Connection, baseline: ctypes.CDLL, rounds: int
) -> dict[str, Any]:
    """Both pulls and both baselines of one case."""
    pipe.send(case)
    pid, region, allocated, registered = pipe.recv()
    target = manager.allocate_blocks_cache(case.desc)
    for tensor in target.tensors:
        tensor.zero_()
    src_ids, dst_ids = ids_of(case, 1), ids_of(case, 2)
    mapping = _C.PeerMapping.open(pid, *region[:4])
    mapped = [mapping.address + address - region[4] for address in allocated]
    common_args = (case.tensors, array(dst_ids), array(src_ids), BLOCKS, case.block_bytes)
    local = array(target.tensor_addrs)
    mapped_array, registered_array = array(mapped), array(registered)

    def read_loop() -> None:
        if baseline.read_loop(pid, local, registered_array, *map(_wide, common_args)):
            raise OSError("the baseline's process_vm_readv failed")

    calls: dict[str, Callable[[], object]] = {
        "pull allocated": lambda: manager.pull_blocks(
            BlocksCacheKey(OWNER, ALLOCATED), target, src_ids, dst_ids
        ),
        "mapping loop": lambda: baseline.copy_loop(local, mapped_array, *map(_wide, common_args)),
        "pull registered": lambda: manager.pull_blocks(
            BlocksCacheKey(OWNER, REGISTERED), target, src_ids, dst_ids
        ),
        "vm_readv loop": read_loop,
    }
    times = common.interleaved(calls, rounds, warmups=2)
    manager.deallocate_blocks_cache(target)
    pipe.send("done")
    pipe.recv()
    rates = {name: common.gb_per_s(case.nbytes, seconds) for name, seconds in times.items()}
    return {
        "block_kib": case.block_bytes // common.KIB,
        "run": case.run,
        "tensors": case.tensors,
        "bytes": case.nbytes,
        "rounds": rounds,
        "gb_per_s": rates,
        "allocated_to_mapping": rates["pull allocated"] / rates["mapping loop"],
        "registered_to_readv": rates["pull registered"] / rates["vm_readv loop"],
    }


def _wide(value: object) -> object:
    return ctypes.c_int64(value) if isinstance(value, int) else value


def measure_latency(manager: CacheManager, pipe: Connection, calls: int) -> dict[str, Any]:
    """A pull of one 4 KiB block of one tensor, in microseconds."""
    case = Case(4 * common.KIB, 1, 1)
    pipe.send(case)
    pipe.recv()
    target = manager.allocate_blocks_cache(case.desc)
    result: dict[str, Any] = {"calls": calls}
    for name, model_id in (("allocated", ALLOCATED), ("registered", REGISTERED)):
        key, times = BlocksCacheKey(OWNER, model_id), []
        for number in range(calls):
            start = time.perf_counter()
            manager.pull_blocks(key, target, [number % POOL], [0])
            times.append((time.perf_counter() - start) * 1e6)
        cuts = statistics.quantiles(times, n=100)
        result[name] = {"p50_us": statistics.median(times), "p99_us": cuts[98]}
    manager.deallocate_blocks_cache(target)
    pipe.send("done")
    pipe.recv()
    return result


def print_row(result: dict[str, Any]) -> None:
    rates = result["gb_per_s"]
    ratios = (result["allocated_to_mapping"], result["registered_to_readv"])
    verdict = " ".join("met" if ratio >= GOAL else "MISSED" for ratio in ratios)
    print(
        f"{result['block_kib']:5} {result['run']:4} {result['tensors']:8}"
        + "".join(f" {rate:16.2f}" for rate in rates.values())
        + f"  {ratios[0]:6.2f} {ratios[1]:6.2f}  {verdict}",
        flush=True,
    )


def main() -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kib", type=int, nargs="*", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--remote", action="store_true", help="remote-accessible mode")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--calls", type=int, default=3000, help="pulls for the latency figures")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()

    common.print_environment()
    baseline = compile_baseline()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs, options.remote), daemon=True)
    owner.start()
    datadist = start_instance(LLMRole.DECODER, PULLER, remote=options.remote)
    peer = LLMClusterInfo()
    peer.remote_cluster_id = OWNER
    peer.append_local_ip_info("127.0.0.1", 0)
    peer.append_remote_ip_info(*pipe.recv())
    datadist.link_clusters([peer], 10_000)

    latency = measure_latency(datadist.cache_manager, pipe, options.calls)
    for name in ("allocated", "registered"):
        print(
            f"one block of 4 KiB, {name}: p50 {latency[name]['p50_us']:.0f} us,"
            f" p99 {latency[name]['p99_us']:.0f} us ({options.calls} pulls)"
        )
    print(f"{BLOCKS} of {POOL} blocks per tensor; GB/s of payload, medians of {options.rounds};")
    print(f"ratios of each pull to its baseline, goal {GOAL}; fewer tensors where memory is short")
    names = ("pull allocated", "mapping loop", "pull registered", "vm_readv loop")
    print("  KiB  run  tensors " + " ".join(f"{name:>16}" for name in names))
    results: list[dict[str, Any]] = [{"latency": latency}]
    for kib in options.kib:
        tensors = min(64, MEMORY_LIMIT // (3 * POOL * kib * common.KIB))
        for run in (1, 16):
            case = Case(kib * common.KIB, run, tensors)
            results.append(measure(case, datadist.cache_manager, pipe, baseline, options.rounds))
            print_row(results[-1])
    pipe.send(None)
    datadist.finalize()
    owner.join(10)
    common.save(options.json, results)


if __name__ == "__main__":
    main()
