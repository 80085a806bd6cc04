# SPDX-License-Identifier: Apache-2.0
"""What things cost as their number grows: blocks, tensors, peers, caches, processes.

``python -m benchmarks.growth --json benchmarks/results/growth.json``: five minutes on a machine
that does nothing else; ``--only`` measures one axis. docs/scaling.md is made of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import llm_datadist_torch as ld
from benchmarks import bench_catalog, bench_links, common
from benchmarks.cases.transfers import transfer
from benchmarks.measuring import KIB, TINY, Effort
from benchmarks.owner import TIMEOUT_S, Owner, memory_of
from benchmarks.peers import Shape
from benchmarks.peers.loops import MappingLoop, why_no_compiler
from benchmarks.peers.ours import Allocated, Registered

BLOCKS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
TENSORS = (2, 8, 32, 64, 128, 256)
PEERS = (1, 4, 16, 64, 256, 512)
CACHES = (10, 100, 1_000, 10_000)
PROCESSES = (1, 2, 4, 8)
BIG = Shape(64 * KIB, 1, 2, 128)  # 16 MiB
CALLS = 200

_context = multiprocessing.get_context("spawn")

Point = dict[str, Any]


def p50_p99_us(seconds: Sequence[float]) -> dict[str, float]:
    """Two figures of what was timed."""
    p50, p99, _ = common.quantiles_ms(list(seconds))
    return {"p50_us": p50 * 1e3, "p99_us": p99 * 1e3}


def timed(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of some calls."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


# -- one pull that grows ---------------------------------------------------------------------------


def blocks(counts: Sequence[int], effort: Effort) -> list[Point]:
    """Scattered blocks of 64 bytes of one tensor."""
    return pulls([Shape(64, 1, 1, count) for count in counts], effort)


def tensors(counts: Sequence[int], effort: Effort) -> list[Point]:
    """128 scattered blocks of 4 KiB of each tensor."""
    return pulls([Shape(4 * KIB, 1, count, 128) for count in counts], effort)


def pulls(shapes: Sequence[Shape], effort: Effort) -> list[Point]:
    """Pulls from an owner's process, beside the C loop."""
    peers = [Allocated(), Registered(), *([] if why_no_compiler() else [MappingLoop()])]
    with closing(Owner()) as owner, ld.open(timeout_s=TIMEOUT_S) as node:
        found = []
        for shape in shapes:
            made = transfer(peers, owner, node, shape, effort, push=False)
            found.append(made)
            print(f"  {made['at']}: " + each_text(made["contenders"]), flush=True)
    return found


def each_text(contenders: Sequence[Point]) -> str:
    """What a block costs each contender."""
    return ", ".join(f"{each['name']} {each['us_per_unit']:.3f} us" for each in contenders)


# -- many peers ------------------------------------------------------------------------------------


def peers(counts: Sequence[int], effort: Effort) -> list[Point]:
    """Links of one instance, whose peers are instances in two other processes."""
    hosts = bench_links.Hosts(max(counts), {})
    weight = bench_links.measure_weight(hosts, {}) if max(counts) > 1 else {}
    found = []
    for count in counts:
        quick = effort is TINY
        rounds, idle_s = (1, 0.1) if quick else (3, 1.0)
        made = bench_links.measure(count, hosts, {}, rounds, max(2 * CALLS, 2 * count), idle_s)
        found.append(made | weight)
        print(f"  {count}: {made}", flush=True)
    hosts.close()
    return found


# -- many caches of one owner ----------------------------------------------------------------------


def caches(counts: Sequence[int], effort: Effort) -> list[Point]:
    """Caches of one owner, each of two tensors of four 4 KiB blocks, with a name."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=own_caches, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    address = _got(ours)
    calls = 10 if effort is TINY else CALLS
    found = []
    with ld.open(timeout_s=TIMEOUT_S) as node:
        peer, room = node.connect(address), small_cache(node, None)
        for count in counts:
            ours.send(count)
            made = {"caches": count} | _got(ours)
            peer.pull("0", room, [0], [0])
            made["known"] = p50_p99_us(timed(lambda: peer.pull("0", room, [0], [0]), calls))
            some = iter([str(count - 1 - number) for number in range(min(calls, count))])
            asked = timed(lambda: peer.pull(next(some), room, [0], [0]), min(calls, count))  # noqa: B023
            made["first"] = p50_p99_us(asked)
            found.append(made)
            print(f"  {made}", flush=True)
    ours.send(None)
    process.join(60)
    process.kill()
    return found


def small_cache(node: ld.Node, name: str | None) -> ld.Cache:
    """A cache of two tensors of four 4 KiB blocks."""
    return node.allocate(
        layers=1, tensors_per_layer=2, blocks=4, shape=(4096,), dtype=torch.uint8, name=name
    )


def own_caches(pipe: Connection) -> None:
    """The owner's process: has as many caches as it is told, until it is told None."""
    try:
        with ld.open(listen="127.0.0.1:0", timeout_s=TIMEOUT_S) as node:
            pipe.send(node.address)
            held: list[ld.Cache] = []
            while (count := pipe.recv()) is not None:
                before, more = bench_links.resident(), count - len(held)
                began = len(held)
                took = timed(lambda: held.append(small_cache(node, str(len(held)))), more)
                pipe.send(
                    {
                        "allocate": p50_p99_us(took),
                        "bytes_per_cache": (bench_links.resident() - before) / more,
                        "descriptors": bench_links.descriptors(),
                        "added": len(held) - began,
                    }
                )
    except Exception:  # noqa: BLE001 (the other process shows it)
        pipe.send(traceback.format_exc())


# -- many processes that pull from one owner -------------------------------------------------------


def processes(counts: Sequence[int], effort: Effort) -> list[Point]:
    """Processes that pull from one owner at once: two blocks of 64 KiB, and 256 of them."""
    found = []
    with closing(Owner()) as owner, owner.serving(BIG, ["allocated"]) as offers:
        for count in counts:
            made: Point = {"processes": count}
            for name, num_blocks in (("small", 1), ("big", BIG.blocks)):
                took, wall = together(count, offers["allocated"], num_blocks, effort)
                nbytes = len(took) * BIG.tensors * num_blocks * BIG.block_bytes
                rates = {"pulls_per_s": len(took) / wall, "gb_per_s": nbytes / wall / 1e9}
                made[name] = p50_p99_us(took) | rates
            found.append(made)
            print(f"  {made}", flush=True)
    return found


def together(
    count: int, address: str, num_blocks: int, effort: Effort
) -> tuple[list[float], float]:
    """Seconds of each pull of all processes, and of all of them together."""
    pipes = []
    for _ in range(count):
        ours, theirs = _context.Pipe()
        args = (theirs, address, num_blocks, effort)
        _context.Process(target=pull_often, args=args, daemon=True).start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        _got(pipe)
    began = time.perf_counter()
    for pipe in pipes:
        pipe.send("go")
    took = [each for pipe in pipes for each in _got(pipe)]
    wall = time.perf_counter() - began
    for pipe in pipes:
        pipe.send("end")
    return took, wall


def pull_often(pipe: Connection, address: str, num_blocks: int, effort: Effort) -> None:
    """A process that pulls the same blocks again and again."""
    try:
        with (
            ld.open(timeout_s=TIMEOUT_S) as node,
            memory_of(node, BIG, owner=False) as memory,
        ):
            room, peer, ids = memory.allocated, node.connect(address), torch.arange(num_blocks)
            timed(lambda: peer.pull("allocated", room, ids, ids), 3)
            calls = effort.rounds if effort.seconds == 0 else (50 if num_blocks > 1 else 2000)
            pipe.send("ready")
            pipe.recv()
            pipe.send(timed(lambda: peer.pull("allocated", room, ids, ids), calls))
            pipe.recv()
    except Exception:  # noqa: BLE001 (the other process shows it)
        pipe.send(traceback.format_exc())


def _got(pipe: Connection) -> Any:  # noqa: ANN401
    """What a process has sent; its traceback ends this one."""
    got = pipe.recv()
    if isinstance(got, str) and got.startswith("Traceback"):
        raise SystemExit(f"growth: a process failed:\n{got}")
    return got


# -- tables without memory -------------------------------------------------------------------------


def catalog(counts: Sequence[int], _effort: Effort) -> list[Point]:
    """The catalog's tables: caches of 100 keys each."""
    found = []
    for count in counts:
        found.append(bench_catalog.measure(count))
        print(f"  {found[-1]}", flush=True)
    return found


AXES: dict[str, tuple[Callable[[Sequence[int], Effort], list[Point]], tuple[int, ...], int]] = {
    "blocks": (blocks, BLOCKS, 2),
    "tensors": (tensors, TENSORS, 2),
    "peers": (peers, PEERS, 2),
    "caches": (caches, CACHES, 1),
    "processes": (processes, PROCESSES, 2),
    "catalog": (catalog, (100, 10_000), 1),
}
"""Axis -> what measures it, its points, and how many of them a tiny run has."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all axes, or some; results of others that are in the file already stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--tiny", action="store_true", help="only see that it works: no figures")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    common.print_environment()
    effort = TINY if options.tiny else Effort()
    record: dict[str, Any] = {"tiny": options.tiny, "environment": common.environment()}
    record |= {"axes": {}, "results": {}}
    if options.json.exists() and not options.tiny:
        record = json.loads(options.json.read_text(encoding="utf-8"))
    for name in options.only:
        measure, points, few = AXES[name]
        print(name, flush=True)
        where = common.environment()
        record["axes"][name] = {each: where[each] for each in ("commit", "time", "load_before")}
        record["results"][name] = measure(points[:few] if options.tiny else points, effort)
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
