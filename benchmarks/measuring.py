# SPDX-License-Identifier: Apache-2.0
"""Measures calls in turn, and what they cost: time, CPU of all processes, memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import quantile
from benchmarks.peers import Call, PeerFailedError

LEAST_ROUNDS = 7
KIB = 1024


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: Rounds of each point at most.
        seconds: Seconds after which a point gets no further round, if it has the least.
        least: Rounds at least.
        in_a_row: Calls of each contender in each round: more where a call is so short that what
            the others left in the processor's caches would be most of it.
    """

    rounds: int = 11
    seconds: float = 3.0
    least: int = LEAST_ROUNDS
    in_a_row: int = 1

    @classmethod
    def of(cls, rounds: int, seconds: float) -> Effort:
        """The effort of options; fewer rounds than LEAST_ROUNDS only where so few are asked for."""
        return cls(rounds, seconds, min(rounds, LEAST_ROUNDS))


TINY = Effort(rounds=2, seconds=0.0, least=2)


@dataclass
class Samples:
    """What was measured of one call."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def cpu_s(pids: Sequence[int]) -> float:
    """CPU time of processes, all threads, by the clock that the kernel has for each."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def measure(
    calls: Mapping[str, Call], effort: Effort, pids: Sequence[int] = (), warmups: int = 1
) -> dict[str, Samples]:
    """Times calls in turn, so that a slow spell of the machine hits all alike.

    Args:
        calls: Name -> call.
        effort: How long.
        pids: Other processes whose CPU time and memory count.
        warmups: Rounds that don't count.

    Returns:
        Those of the calls that never failed.
    """
    calls = dict(calls)
    every = (os.getpid(), *pids)
    found = {name: Samples() for name in calls}
    start = time.perf_counter()
    for number in range(warmups + effort.rounds):
        late = time.perf_counter() - start > effort.seconds
        if late and number >= warmups + effort.least:
            break
        for name, call in list(calls.items()):
            samples = found[name] if number >= warmups else Samples()
            try:
                take(call, samples, effort.in_a_row, every)
            except PeerFailedError:
                del calls[name], found[name]
    for name, call in calls.items():
        found[name].peak_bytes = peak_of(call, every)
    return found


def take(call: Call, samples: Samples, count: int, pids: Sequence[int]) -> None:
    """Time a call so many times in a row."""
    for _ in range(count):
        cpu, began = cpu_s(pids), time.perf_counter()
        call()
        samples.seconds.append(time.perf_counter() - began)
        samples.cpu_s.append(cpu_s(pids) - cpu)


def peak_of(call: Call, pids: Sequence[int]) -> int:
    """Bytes of memory that processes have during a call, at most, beyond what they had before."""
    before = sum(_status(pid, "VmRSS") for pid in pids)
    for pid in pids:
        # 5 resets VmHWM, the peak.
        with suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    call()
    return max(0, sum(_status(pid, "VmHWM") for pid in pids) - before)


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * KIB
    return 0


def figures(samples: Samples, nbytes: int = 0, units: int = 0) -> dict[str, float]:
    """The figures of one call.

    Args:
        samples: What was measured.
        nbytes: Bytes that it moves; 0 for none.
        units: Blocks, links or runs that it is about; 0 for none.
    """
    middle = statistics.median(samples.seconds)
    found: dict[str, float] = {
        "p50_us": middle * 1e6,
        "p99_us": quantile(samples.seconds, 0.99) * 1e6,
        "peak_bytes": samples.peak_bytes,
    }
    if nbytes:
        found["gb_per_s"] = nbytes / middle / 1e9
        found["cpu_s_per_gb"] = statistics.mean(samples.cpu_s) / (nbytes / 1e9)
    if units:
        found["us_per_unit"] = middle * 1e6 / units
    return found


def point(
    place: Mapping[str, int | str], contenders: list[dict[str, Any]], **further: object
) -> dict[str, Any]:
    """One point of a sweep, as it is in the JSON."""
    return {"at": dict(place), "contenders": contenders, **further}


def contender(
    name: str,
    role: str,
    found: Mapping[str, float],
    baselines: Sequence[str] = (),
    ceiling: str = "",
) -> dict[str, Any]:
    """One contender of a point, as it is in the JSON."""
    return {
        "name": name,
        "role": role,
        "baselines": list(baselines),
        "ceiling": ceiling,
        **found,
    }
