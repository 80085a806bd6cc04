# SPDX-License-Identifier: Apache-2.0
"""Two builds of this library side by side: ``python -m benchmarks.compare_builds --before TREE``.

TREE is a checkout of another commit (``git worktree add``) with its extension built in place; the
build that is measured against it is the checkout that this command is run from. Each case is
measured in turns in two pairs of processes, one of each build; medians of all rounds. What only the
other build imports (pyzmq, say) is found in the folder that ``--before-path`` names. ``--page``
writes the table of a JSON file into a Markdown page, between its markers."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import common
from benchmarks.common import ROOT, quantile

SIDE = Path(__file__).with_name("build_side.py")
IMPORTED = """
import json, sys, time
import torch
before, began = len(sys.modules), time.perf_counter()
import llm_datadist_torch
llm_datadist_torch.LLMDataDist
print(json.dumps([(time.perf_counter() - began) * 1e6, len(sys.modules) - before]))
"""
RESULTS = ROOT / "benchmarks/results/builds.json"
PAGE = ROOT / "docs/decisions/connections.md"
MARKERS = ("<!-- builds: start -->", "<!-- builds: end -->")
GOALS: dict[str, tuple[str, float, float]] = {
    # case: (what, the percentile, at most so much of before)
    "two-sided": ("two-sided pull of one 4 KiB block, p50", 0.5, 0.25),
    "known": ("known pull of one 4 KiB block, p50", 0.5, 0.45),
    "busy": ("two-sided pull, owner busy in Python, p99", 0.99, 0.5),
    "beside": ("one-block pulls beside one of 1 GiB, p99", 0.99, 0.05),
    "many-4096": ("two-sided pull of 64 x 128 blocks of 4 KiB, p50", 0.5, 1.0),
    "many-16384": ("two-sided pull of 64 x 128 blocks of 16 KiB, p50", 0.5, 1.0),
    "many-65536": ("two-sided pull of 32 x 128 blocks of 64 KiB, p50", 0.5, 1.0),
    "many-262144": ("two-sided pull of 8 x 128 blocks of 256 KiB, p50", 0.5, 1.0),
    "link-1": ("set-up of 1 link, p50", 0.5, 0.6),
    "link-16": ("set-up of 16 links, p50", 0.5, 0.6),
    "link-128": ("set-up of 128 links, p50", 0.5, 0.6),
    "nixl": ("pull of one 4 KiB block over NIXL, p50", 0.5, 0.5),
}


class Side:
    """A process that measures cases of one build."""

    def __init__(self, tree: Path, further: str = "") -> None:
        self._tree = tree
        self._environment = os.environ | {"PYTHONPATH": f"{tree}:{further}"}
        # Imports are measured as users have them, with their bytecode on disk.
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._process = subprocess.Popen(
            [sys.executable, str(SIDE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env=self._environment,
        )
        found = Path(self._answer()).resolve()
        if tree.resolve() not in found.parents:
            raise SystemExit(f"compare_builds: {found} is imported instead of the build in {tree}")

    def _answer(self) -> Any:  # noqa: ANN401
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("compare_builds: a side has ended, see its error above")
        return json.loads(line)

    def measure(self, case: str) -> list[float]:
        """Microseconds of each call of a case."""
        assert self._process.stdin is not None
        print(case, file=self._process.stdin, flush=True)
        found: list[float] = self._answer()
        return found

    def import_anew(self) -> tuple[float, int]:
        """Microseconds and modules of an import in a new process, beyond torch's."""
        printed = subprocess.run(
            [sys.executable, "-c", IMPORTED],
            cwd=self._tree,
            env=self._environment,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        micros, modules = json.loads(printed)
        return micros, modules

    def close(self) -> None:
        """Let it end its processes; it reads no further case."""
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def compare(case: str, sides: dict[str, Side], rounds: int) -> dict[str, Any]:
    """The percentile of each round; of those the median, for each side."""
    what, part, goal = GOALS[case]
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(quantile(side.measure(case), part))
    return row(what, found["before"], found["after"], goal)


def row(what: str, earlier: list[float], now: list[float], goal: float) -> dict[str, Any]:
    first, second = statistics.median(earlier), statistics.median(now)
    return {
        "what": what,
        "before_us": first,
        "after_us": second,
        "ratio": second / first,
        "goal": goal,
        "rounds_before_us": earlier,
        "rounds_after_us": now,
    }


def registered(sides: dict[str, Side], rounds: int) -> dict[str, Any]:
    """Registered tensors ask the owner now; the baseline is the two-sided pull of before."""
    earlier, now = [], []
    for _ in range(rounds):
        earlier.append(quantile(sides["before"].measure("two-sided"), 0.5))
        now.append(quantile(sides["after"].measure("registered"), 0.5))
    return row("pull of one 4 KiB block of registered tensors, p50", earlier, now, 0.25)


def imports(sides: dict[str, Side], rounds: int) -> dict[str, Any]:
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    for number in range(-1, rounds):
        for name, side in sides.items():
            taken = side.import_anew()
            if number >= 0:  # the first writes bytecode
                found[name].append(taken)
    times = {name: [one[0] for one in ones] for name, ones in found.items()}
    compared = row("import beyond torch's", times["before"], times["after"], 0.5)
    modules = {f"modules_{name}": ones[0][1] for name, ones in found.items()}
    return compared | modules


def table(found: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    earlier, now = found["commits"]["before"], found["commits"]["after"]
    lines = [
        f"| | before (`{earlier}`), µs | after (`{now}`), µs | ratio | goal | |",
        "|---|---|---|---|---|---|",
    ]
    for one in found["rows"]:
        met = "met" if one["ratio"] <= one["goal"] else "missed"
        lines.append(
            f"| {one['what']} | {one['before_us']:,.0f} | {one['after_us']:,.0f}"
            f" | {one['ratio']:.2g} | {one['goal']:.2g} | {met} |"
        )
    return "\n".join(lines)


def with_table(page: str, found: dict[str, Any]) -> str:
    """A page with the table between its markers."""
    head, _, rest = page.partition(MARKERS[0])
    _, _, tail = rest.partition(MARKERS[1])
    return f"{head}{MARKERS[0]}\n{table(found)}\n{MARKERS[1]}{tail}"


FURTHER = {"registered": registered, "import": imports}


def measured(case: str, sides: dict[str, Side], rounds: int) -> dict[str, Any]:
    """One case, which is shown, too."""
    one = FURTHER[case](sides, rounds) if case in FURTHER else compare(case, sides, rounds)
    Console(width=110).print(
        f"{one['what']:55} {one['before_us']:12.1f} {one['after_us']:12.1f} us"
        f"  ratio {one['ratio']:.2f}, goal {one['goal']}"
    )
    return one


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_builds", description=__doc__
    )
    parser.add_argument("--before", type=Path, help="a checkout with its build")
    parser.add_argument("--before-path", default="", help="folder of what only it imports")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--case", action="append", choices=[*GOALS, *FURTHER])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true", help=f"write {RESULTS.name} into {PAGE}")
    args = parser.parse_args()
    if args.page:
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        return
    if args.before is None:
        parser.error("--before is needed: a checkout of another commit")
    sides = {"before": Side(args.before, args.before_path), "after": Side(ROOT)}
    try:
        rows = [measured(case, sides, args.rounds) for case in args.case or [*GOALS, *FURTHER]]
    finally:
        for side in sides.values():
            side.close()
    if args.json is not None:
        commits = {"before": common.commit(args.before), "after": common.commit()}
        record = {"environment": common.environment(), "commits": commits, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
