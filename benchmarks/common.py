# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: interleaved timing, medians, and where and how it was run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.values.environment import npu_is_simulated

if npu_is_simulated():
    raise SystemExit(
        "benchmarks: the Ascend runtime is simulated on host memory; no figures from it"
    )

PEERS = ("nixl-cu12", "mooncake-transfer-engine-non-cuda", "numpy", "vllm")
ROOT = Path(__file__).resolve().parent.parent
KIB = 1024


def cpu_model() -> str:
    """The CPU's name as the kernel knows it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit(tree: Path = ROOT) -> str:
    """The commit that is checked out, marked where files differ from it; "unknown" outside git."""
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def command() -> str:
    """How this program was started, as a module and without folders of this machine."""
    program = Path(sys.argv[0])
    module = program.parent.name if program.name == "__main__.py" else f"benchmarks.{program.stem}"
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_threads": torch.get_num_threads(),
        "versions": versions(),
        "build": dict(_C.build_facts()),
    }


def versions() -> dict[str, str]:
    """Versions of this library and of what it is compared with, as far as they are installed."""
    found = {}
    for name in ("llm_datadist_torch", *PEERS):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn so that a slow spell of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmups + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= warmups:
                times[name].append(time.perf_counter() - start)
    return times


def gb_per_s(nbytes: int, seconds: list[float]) -> float:
    """Median throughput in 10**9 bytes per second."""
    return nbytes / statistics.median(seconds) / 1e9


def save(path: Path | None, results: list[dict[str, Any]]) -> None:
    """Write the results with their environment as JSON; does nothing without a path."""
    if path is not None:
        record = {"environment": environment(), "results": results}
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def print_environment() -> None:
    """Print the environment, one line."""
    env = environment()
    torch_part = f"torch {env['torch']} ({env['torch_threads']} threads)"
    print(f"{env['cpu']}, {env['cores']} cores, {torch_part}, Python {env['python']}")
    print(f"commit {env['commit']}, load {env['load_before']:.1f}, {env['time']}")


def quantile(values: Iterable[float], part: float) -> float:
    """The value that so large a part of all lies below; of an empty list there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def quantiles_ms(seconds: list[float]) -> tuple[float, float, float]:
    """p50, p99 and the largest, in milliseconds."""
    p50, p99 = statistics.median(seconds), quantile(seconds, 0.99)
    return 1000 * p50, 1000 * p99, 1000 * max(seconds)
