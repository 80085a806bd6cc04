# SPDX-License-Identifier: Apache-2.0
"""pull_blocks over the transport nixl, against a loop on NIXL itself.

The owner is a process of its own. The loop is what NIXL's documents advise for KV caches: memory
registered once, descriptor lists of all blocks prepared once, per round one READ made of block
indices in an array, posted, and polled without a nap. It asks nobody, checks nothing, holds no
lease and can't be stopped. A pull of the library is a request to the owner, which checks it and
WRITEs (see docs/design.md); the cache is known from the pull before, so that there is no other
message. Figures are medians, taken in turn in one process. ``--tls tcp`` is how two hosts without
RDMA would do it; without it UCX chooses what it likes best within one host."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_pull, common
from benchmarks.bench_pull import BLOCKS, OWNER, POOL, PULLER, ids_of
from llm_datadist_torch import (
    BlocksCacheKey,
    Cache,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
)

BYTES_PER_CALL = 128 << 20  # at most, by the number of tensors
GOAL = 0.95
MERGED_GOAL = 1.0
WAKE_US = 20_000


class Case(bench_pull.Case):
    """A point of that sweep, with what is wanted of it here."""

    @property
    def goal(self) -> float | None:
        if self.run > 1:
            return MERGED_GOAL
        return GOAL if self.block_bytes >= 64 * common.KIB else None


class RawAgent:
    """NIXL without this library; the same settings, so that its threads don't spin.

    NIXL's bindings and NumPy, which comes with them, have no type information here.
    """

    def __init__(self) -> None:
        import nixl_cu12._bindings as nixl

        self.nixl = nixl
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.useListenThread = True, False
        config.pthrDelay = WAKE_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        self.name = uuid.uuid4().hex
        self.agent = nixl.nixlAgent(self.name, config)
        self.ucx = [self.agent.createBackend("UCX", {})]

    def register(self, cache: Cache) -> Any:  # noqa: ANN401
        """Register all tensors of a cache; returns NIXL's list, for ``deregister``."""
        rows = [[t.data_ptr(), t.nbytes, 0] for t in cache.tensors]
        memory = self.nixl.nixlRegDList(self.nixl.DRAM_SEG, _table(rows))
        self.agent.registerMem(memory, self.ucx)
        return memory

    def prepare(self, addresses: list[int], block_bytes: int, name: str | None = None) -> int:
        """Prepare a list of all blocks of tensors, of ours or of a peer's."""
        starts = torch.tensor(addresses)[:, None] + torch.arange(POOL) * block_bytes
        flat = starts.flatten()
        columns = (flat, torch.full_like(flat, block_bytes), torch.zeros_like(flat))
        blocks = self.nixl.nixlXferDList(
            self.nixl.DRAM_SEG, torch.stack(columns, dim=1).numpy().view("uint64")
        )
        args = (blocks, self.ucx)
        return int(self.agent.prepXferDlist(*args if name is None else (name, *args)))

    def read(self, mine: int, my_ids: Any, theirs: int, their_ids: Any) -> None:  # noqa: ANN401
        """Read blocks by index; polls until they are here."""
        nixl, agent = self.nixl, self.agent
        handle = agent.makeXferReq(nixl.NIXL_READ, mine, my_ids, theirs, their_ids, "", self.ucx)
        status = agent.postXferReq(handle, "")
        while status == nixl.NIXL_IN_PROG:
            status = agent.getXferStatus(handle)
        agent.releaseXferReq(handle)


def _table(rows: list[list[int]]) -> Any:  # noqa: ANN401
    return torch.tensor(rows).numpy().view("uint64")


def start_instance(role: LLMRole, cluster_id: int) -> LLMDataDist:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True  # the table of known caches
    config.transport = "nixl"
    config.listen_ip_info = "127.0.0.1:0"
    config.sync_kv_timeout = 60_000
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def own(pipe: Connection) -> None:
    """The owner's process: makes caches as it is told, until it is told None."""
    datadist = start_instance(LLMRole.PROMPT, OWNER)
    manager = datadist.cache_manager
    pipe.send(datadist.listen_address)
    while (case := pipe.recv()) is not None:
        cache = manager.allocate_blocks_cache(case.desc, BlocksCacheKey(OWNER))
        for tensor in cache.tensors:
            tensor.random_()
        raw = RawAgent()
        memory = raw.register(cache)
        pipe.send((raw.name, raw.agent.getLocalMD(), cache.tensor_addrs))
        # While the other side measures it answers with the CPU time that went by.
        while pipe.recv() == "cpu":
            pipe.send(cpu_s())
        raw.agent.deregisterMem(memory, raw.ucx)
        manager.deallocate_blocks_cache(cache)
        del raw, cache
        pipe.send("freed")
    datadist.finalize()


def cpu_s() -> float:
    """CPU time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def over_tensors(case: Case, ids: torch.Tensor) -> Any:  # noqa: ANN401
    """Indices into a list of all blocks of all tensors."""
    return (torch.arange(case.tensors)[:, None] * POOL + ids).flatten().to(torch.int32).numpy()


def cpu_per_gb(case: Case, pipe: Connection, call: Callable[[], object], rounds: int) -> float:
    """CPU seconds of both processes per 10**9 bytes."""
    pipe.send("cpu")
    before = cpu_s() + pipe.recv()
    for _ in range(rounds):
        call()
    pipe.send("cpu")
    return float(cpu_s() + pipe.recv() - before) / (rounds * case.nbytes / 1e9)


def measure(case: Case, datadist: LLMDataDist, pipe: Connection, rounds: int) -> dict[str, Any]:
    """The pull and the loop of one case; their bytes are compared first."""
    pipe.send(case)
    name, metadata, addresses = pipe.recv()
    manager = datadist.cache_manager
    target = manager.allocate_blocks_cache(case.desc)
    raw = RawAgent()
    memory = raw.register(target)
    raw.agent.loadRemoteMD(metadata)
    src_ids, dst_ids = ids_of(case, 1), ids_of(case, 2)
    mine = raw.prepare(target.tensor_addrs, case.block_bytes)
    theirs = raw.prepare(addresses, case.block_bytes, name)
    my_ids, their_ids = over_tensors(case, dst_ids), over_tensors(case, src_ids)
    calls: dict[str, Callable[[], object]] = {
        "pull": lambda: manager.pull_blocks(BlocksCacheKey(OWNER), target, src_ids, dst_ids),
        "raw NIXL": lambda: raw.read(mine, my_ids, theirs, their_ids),
    }
    images = []
    for call in calls.values():
        for tensor in target.tensors:
            tensor.zero_()
        call()
        images.append([tensor.clone() for tensor in target.tensors])
    if not all(map(torch.equal, *images)):
        raise SystemExit("the two do not read the same bytes")
    times = common.interleaved(calls, rounds)
    cpu = {way: cpu_per_gb(case, pipe, call, max(3, rounds // 3)) for way, call in calls.items()}
    raw.agent.deregisterMem(memory, raw.ucx)
    manager.deallocate_blocks_cache(target)
    pipe.send("done")
    pipe.recv()
    rates = {way: common.gb_per_s(case.nbytes, seconds) for way, seconds in times.items()}
    return {
        "block_kib": case.block_bytes // common.KIB,
        "run": case.run,
        "tensors": case.tensors,
        "bytes": case.nbytes,
        "rounds": rounds,
        "goal": case.goal,
        "gb_per_s": rates,
        "cpu_s_per_gb": cpu,
        "ratio": rates["pull"] / rates["raw NIXL"],
    }


def measure_latency(datadist: LLMDataDist, pipe: Connection, calls: int) -> dict[str, Any]:
    """Microseconds of one 4 KiB block of one tensor."""
    case = Case(4 * common.KIB, 1, 1)
    pipe.send(case)
    name, metadata, addresses = pipe.recv()
    manager = datadist.cache_manager
    target = manager.allocate_blocks_cache(case.desc)
    raw = RawAgent()
    memory = raw.register(target)
    raw.agent.loadRemoteMD(metadata)
    mine = raw.prepare(target.tensor_addrs, case.block_bytes)
    theirs = raw.prepare(addresses, case.block_bytes, name)
    one = over_tensors(case, torch.tensor([0]))
    taken = common.interleaved(
        {
            "pull": lambda: manager.pull_blocks(BlocksCacheKey(OWNER), target, [7], [0]),
            "raw NIXL": lambda: raw.read(mine, one, theirs, one),
        },
        calls,
        warmups=10,
    )
    raw.agent.deregisterMem(memory, raw.ucx)
    manager.deallocate_blocks_cache(target)
    pipe.send("done")
    pipe.recv()
    return {
        way: {
            "p50_us": statistics.median(seconds) * 1e6,
            "p99_us": statistics.quantiles(seconds, n=100)[98] * 1e6,
        }
        for way, seconds in taken.items()
    }


def print_row(result: dict[str, Any]) -> None:
    goal, ratio = result["goal"], result["ratio"]
    verdict = "" if goal is None else "met" if ratio >= goal else f"MISSED ({goal})"
    print(
        f"{result['block_kib']:5} {result['run']:4} {result['tensors']:8}"
        + "".join(f" {rate:10.2f}" for rate in result["gb_per_s"].values())
        + f" {ratio:7.2f}"
        + "".join(f" {cpu:10.2f}" for cpu in result["cpu_s_per_gb"].values())
        + f"  {verdict}",
        flush=True,
    )


def main() -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kib", type=int, nargs="*", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--tls", help="UCX_TLS for both processes, such as tcp")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--calls", type=int, default=1000, help="pulls for the latency figures")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    if options.tls:
        os.environ["UCX_TLS"] = options.tls

    common.print_environment()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs,), daemon=True)
    owner.start()
    datadist = start_instance(LLMRole.DECODER, PULLER)
    peer = LLMClusterInfo()
    peer.remote_cluster_id = OWNER
    peer.append_local_ip_info("127.0.0.1", 0)
    peer.append_remote_ip_info(*pipe.recv())
    datadist.link_clusters([peer], 10_000)

    latency = measure_latency(datadist, pipe, options.calls)
    for way, cut in latency.items():
        print(f"one block of 4 KiB, {way}: p50 {cut['p50_us']:.0f} us, p99 {cut['p99_us']:.0f} us")
    print(f"UCX_TLS={options.tls or '(its choice)'}; {BLOCKS} of {POOL} blocks per tensor; medians")
    print("  KiB  run  tensors  pull GB/s  raw GB/s   ratio pull s/GB    raw s/GB (CPU, both ends)")
    results: list[dict[str, Any]] = [{"latency": latency, "tls": options.tls}]
    for kib in options.kib:
        tensors = max(1, min(32, BYTES_PER_CALL // (BLOCKS * kib * common.KIB)))
        for run in (1, 16):
            case = Case(kib * common.KIB, run, tensors)
            results.append(measure(case, datadist, pipe, options.rounds))
            print_row(results[-1])
    pipe.send(None)
    datadist.finalize()
    owner.join(10)
    common.save(options.json, results)


if __name__ == "__main__":
    main()
