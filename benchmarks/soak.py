# SPDX-License-Identifier: Apache-2.0
"""Mixed operations of several processes for a given time: bytes are compared, growth is looked for.

Each process pulls, pushes, sends layer by layer, offers and fetches requests, allocates, copies,
frees, links and unlinks at random; the last one is killed now and then, and started again. The soak
fails if an operation ends in a way that it must not, if a byte is wrong, if memory, descriptors or
threads of a process that lives all the time grow, or if anything is still held in the end.

``python -m benchmarks.soak --minutes 30``; ``--option KEY=VALUE`` (for example ``--option
llm.LinkSecret=...``) sets an option of all instances.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.soak_worker import SLOTS, Plan, Report, serve

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.soak_worker"])

ANSWER_S = 120.0
METRICS = ("pss_mib", "rss_mib", "fds", "threads")


def sample(pid: int) -> dict[str, float]:
    """What a process holds now."""
    proc = Path(f"/proc/{pid}")
    rollup = dict(
        line.split(":", 1) for line in (proc / "smaps_rollup").read_text().splitlines()[1:]
    )
    return {
        "pss_mib": int(rollup["Pss"].split()[0]) / 1024,
        "rss_mib": int(rollup["Rss"].split()[0]) / 1024,
        "fds": len(list((proc / "fd").iterdir())),
        "threads": len(list((proc / "task").iterdir())),
    }


@dataclass
class Limits:
    """How much more a process may hold in the last quarter than in the second."""

    mib: float = 16.0
    fds: float = 4.0
    threads: float = 2.0

    def of(self, metric: str) -> float:
        return self.mib if metric.endswith("_mib") else getattr(self, metric)


def growth(samples: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Medians of the second and the last quarter, per metric: the first is for warming up."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    return {
        metric: (
            statistics.median(each[metric] for each in early or samples),
            statistics.median(each[metric] for each in late),
        )
        for metric in METRICS
    }


@dataclass
class Process:
    """A worker's process and the pipe to it."""

    plan: Plan
    process: Any
    pipe: Any
    port: int = 0
    samples: list[dict[str, float]] = field(default_factory=list)

    def call(self, command: str, argument: object = None) -> Any:  # noqa: ANN401
        self.pipe.send((command, argument))
        return self.answer()

    def answer(self) -> Any:  # noqa: ANN401
        if not self.pipe.poll(ANSWER_S):
            raise RuntimeError(f"worker {self.plan.number} does not answer to its parent")
        return self.pipe.recv()


class Soak:
    """The workers, and what is seen of them."""

    def __init__(
        self, workers: int, threads: int, seed: int, pause_s: float, options: Mapping[str, str]
    ) -> None:
        self.board = _context.RawArray("q", workers * SLOTS)
        self.done: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.kills = 0
        plans = [
            Plan(n + 1, 1, 0, workers, threads, seed, pause_s, options) for n in range(workers)
        ]
        self.workers = [self._start(plan) for plan in plans]
        self._report()
        for worker in self.workers:
            worker.pipe.send(("run", None))

    def _start(self, plan: Plan) -> Process:
        ours, theirs = _context.Pipe()
        process = _context.Process(target=serve, args=(theirs, plan, self.board), daemon=True)
        process.start()
        theirs.close()
        started = Process(plan, process, ours)
        started.port = started.answer()
        return started

    def _report(self) -> None:
        peers = {w.plan.number: (w.port, w.plan.generation) for w in self.workers}
        for worker in self.workers:
            worker.pipe.send(("peers", peers))

    def kill_the_last(self) -> None:
        """Kill the last worker, and start another one in its place, at the same port."""
        old = self.workers[-1]
        self._count(old.call("report"))
        old.process.kill()
        old.process.join()
        self.kills += 1
        for slot in range((old.plan.number - 1) * SLOTS, old.plan.number * SLOTS):
            self.board[slot] = 0
        fields = {**vars(old.plan), "generation": old.plan.generation + 1, "port": old.port}
        self.workers[-1] = self._start(Plan(**fields))
        self._report()
        self.workers[-1].pipe.send(("run", None))

    def _count(self, report: Report) -> None:
        self.done.update(report.done)
        if report.error:
            self.problems.append(report.error)

    def look(self) -> None:
        """Take a sample of each worker, and ask whether all is well."""
        for worker in self.workers:
            worker.samples.append(sample(worker.process.pid))
            report = worker.call("report")
            if report.error:
                self.problems.append(report.error)

    def finish(self) -> None:
        """Let all operations end, and see what is left."""
        for command in ("finish", "left", "end"):
            for worker in self.workers:
                worker.pipe.send((command, None))
            for worker in self.workers:
                answer = worker.answer()
                if command == "left":
                    self._count(answer)
                    if any(answer.left.values()):
                        self.problems.append(f"worker {worker.plan.number} holds {answer.left}")
        self.close()

    def close(self) -> None:
        """End what is still there."""
        for worker in self.workers:
            worker.pipe.close()
            worker.process.join(5)
            worker.process.kill()


def run(
    seconds: float,
    *,
    workers: int = 4,
    threads: int = 2,
    seed: int = 1,
    pause_s: float = 0.01,
    kill_every_s: float = 20.0,
    sample_every_s: float = 5.0,
    limits: Limits | None = None,
    options: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run the soak; blocks for a bit more than ``seconds``.

    Returns:
        The figures; "problems" is empty if all was well.
    """
    limits = limits or Limits()
    rng = random.Random(seed)
    soak = Soak(workers, threads, seed, pause_s, options or {})
    try:
        start = time.monotonic()
        next_kill, next_look = start + kill_every_s * rng.uniform(0.5, 1.5), start
        while (now := time.monotonic()) < start + seconds and not soak.problems:
            if now >= next_kill:
                soak.kill_the_last()
                next_kill = time.monotonic() + kill_every_s * rng.uniform(0.5, 1.5)
            if now >= next_look:
                soak.look()
                next_look += sample_every_s
            time.sleep(0.02)
        # Those that lived all the time.
        flat = {w.plan.number: growth(w.samples) for w in soak.workers if w.plan.generation == 1}
        series = {w.plan.number: w.samples for w in soak.workers if w.plan.generation == 1}
        soak.finish()
    finally:
        soak.close()
    for number, metrics in flat.items():
        for metric, (early, late) in metrics.items():
            if late - early > limits.of(metric):
                soak.problems.append(
                    f"worker {number}: {metric} grew from {early:.1f} to {late:.1f}"
                )
    return {
        "seconds": seconds,
        "workers": workers,
        "threads": threads,
        "seed": seed,
        "options": sorted(options or {}),
        "kills": soak.kills,
        "operations": sum(soak.done.values()),
        "done": dict(sorted(soak.done.items())),
        "growth": flat,
        "samples": series,
        "problems": soak.problems,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['operations']} operations, {result['kills']} kills, {result['seconds']:.0f} s")
    for name, count in result["done"].items():
        print(f"  {count:9d}  {name}")
    print("medians of the second and the last quarter, of processes that lived all the time")
    for number, metrics in result["growth"].items():
        row = "  ".join(f"{name} {a:.1f} -> {b:.1f}" for name, (a, b) in metrics.items())
        print(f"  worker {number}: {row}")
    for problem in result["problems"]:
        print(f"PROBLEM {problem}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="of operations, per process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause-ms", type=float, default=10.0, help="between two operations")
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds, on average")
    parser.add_argument("--sample-every", type=float, default=5.0, help="seconds")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common.print_environment()
    result = run(
        args.minutes * 60,
        workers=args.workers,
        threads=args.threads,
        seed=args.seed,
        pause_s=args.pause_ms / 1000,
        kill_every_s=args.kill_every,
        sample_every_s=args.sample_every,
        options=dict(text.split("=", 1) for text in args.option),
    )
    show(result)
    common.save(args.json, [json.loads(json.dumps(result))])
    sys.exit(bool(result["problems"]))


if __name__ == "__main__":
    main()
