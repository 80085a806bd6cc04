# SPDX-License-Identifier: Apache-2.0
"""Mixed operations of several processes for a given time: bytes are compared, growth is looked for.

Each process pulls, pushes, sends layer by layer, offers and fetches requests, allocates, copies,
frees, links and unlinks at random, and lets torch move the storages of caches. Meanwhile

- the last process is killed now and then, and started again;
- connections of live processes are cut, as by a reset in the network;
- processes are stopped, and go on later;
- threads hold the GIL for a while;
- the clock of the day jumps, by up to years in both directions (a library that is preloaded does
  that, so a C compiler is needed).

The soak fails if an operation ends in a way that it must not, if a byte is wrong, if memory,
descriptors or threads of a process that lives all the time grow, or if anything is still held in
the end.

``python -m benchmarks.soak --minutes 30``; ``--option KEY=VALUE`` (for example ``--option
llm.LinkSecret=...``) sets an option of all instances.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.soak_worker import Plan, Report, board_size, serve, slots_of
from llm_datadist_torch.cli.progress import progress_bar

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.soak_worker"])

ANSWER_S = 120.0
DISTURBANCE_S = 2.0
"""How long a process is stopped, or a thread of it holds the GIL, at most."""
CLOCK_JUMP_S = 10 * 365 * 86400
"""How far the clock of a process is set from the machine's at most, in both directions."""
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


@contextmanager
def jumping_clock() -> Iterator[None]:
    """What is started in here can set its own clock: it is preloaded with ``jumping_clock.c``.

    To be used before this process has started another one by multiprocessing's forkserver, from
    which all are forked.
    """
    source, before = Path(__file__).with_name("jumping_clock.c"), os.environ.get("LD_PRELOAD")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "jumping_clock.so"
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", source, "-o", library], check=True)
        os.environ["LD_PRELOAD"] = " ".join(filter(None, (str(library), before)))
        try:
            # All processes are forked from this one.
            process = _context.Process(target=int)
            process.start()
            process.join()
        finally:
            if before is None:
                del os.environ["LD_PRELOAD"]
            else:
                os.environ["LD_PRELOAD"] = before
        yield


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
        self.board = _context.RawArray("q", board_size(workers, threads))
        self.rng = random.Random(seed)
        self.done: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.disturbances: collections.Counter[str] = collections.Counter()
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
        for slot in slots_of(old.plan):
            self.board[slot] = 0
        fields = {**vars(old.plan), "generation": old.plan.generation + 1, "port": old.port}
        self.workers[-1] = self._start(Plan(**fields))
        self._report()
        self.workers[-1].pipe.send(("run", None))

    def disturb(self) -> None:
        """Do one of the things that happen to processes and their connections."""
        table: dict[str, Callable[[], None]] = {
            "process killed": self.kill_the_last,
            "connections cut": lambda: self._tell_one("cut"),
            "process stopped": self._stop_one,
            "GIL held": lambda: self._tell_one("hold_gil", self.rng.uniform(0.2, DISTURBANCE_S)),
            "clock set": lambda: self._tell_one(
                "set_clock", self.rng.randint(-CLOCK_JUMP_S, CLOCK_JUMP_S)
            ),
        }
        # Each kind in turn, so that a short soak has them all.
        name = list(table)[self.disturbances.total() % len(table)]
        table[name]()
        self.disturbances[name] += 1

    def _tell_one(self, command: str, argument: object = None) -> None:
        self.rng.choice(self.workers).pipe.send((command, argument))

    def _stop_one(self) -> None:
        pid = self.rng.choice(self.workers).process.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(self.rng.uniform(0.2, DISTURBANCE_S))
        finally:
            os.kill(pid, signal.SIGCONT)

    def _count(self, report: Report) -> None:
        self.done.update(report.done)
        if report.error:
            self.problems.append(report.error)

    def look(self) -> None:
        """Take a sample of each worker, and ask whether all is well."""
        for worker in self.workers:
            if not worker.process.is_alive():
                code = worker.process.exitcode
                self.problems.append(f"worker {worker.plan.number} has died, exit code {code}")
                return
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
    disturb_every_s: float = 4.0,
    sample_every_s: float = 5.0,
    limits: Limits | None = None,
    options: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run the soak; blocks for a bit more than ``seconds``.

    Returns:
        The figures; "problems" is empty if all was well.
    """
    limits = limits or Limits()
    with jumping_clock():
        soak = Soak(workers, threads, seed, pause_s, options or {})
        try:
            _watch(soak, seconds, disturb_every_s, sample_every_s)
            # Those that lived all the time.
            flat = {
                w.plan.number: growth(w.samples) for w in soak.workers if w.plan.generation == 1
            }
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
        "disturbances": dict(soak.disturbances),
        "operations": sum(soak.done.values()),
        "done": dict(sorted(soak.done.items())),
        "growth": flat,
        "samples": series,
        "problems": soak.problems,
    }


def _watch(soak: Soak, seconds: float, disturb_every_s: float, sample_every_s: float) -> None:
    start = time.monotonic()
    next_disturbance, next_look = start + disturb_every_s, start
    with progress_bar("soak, seconds", seconds) as done:
        while (now := time.monotonic()) < start + seconds and not soak.problems:
            if now >= next_disturbance:
                soak.disturb()
                next_disturbance = time.monotonic() + disturb_every_s * soak.rng.uniform(0.5, 1.5)
            if now >= next_look:
                soak.look()
                done(now - start)
                next_look += sample_every_s
            time.sleep(0.02)


def show(result: dict[str, Any]) -> None:
    print(f"{result['operations']} operations, {result['seconds']:.0f} s")
    for name, count in result["disturbances"].items():
        print(f"  {count:9d}  {name}")
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
    parser.add_argument("--disturb-every", type=float, default=4.0, help="seconds, on average")
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
        disturb_every_s=args.disturb_every,
        sample_every_s=args.sample_every,
        options=dict(text.split("=", 1) for text in args.option),
    )
    show(result)
    common.save(args.json, [json.loads(json.dumps(result))])
    sys.exit(bool(result["problems"]))


if __name__ == "__main__":
    main()
