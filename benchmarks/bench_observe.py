# SPDX-License-Identifier: Apache-2.0
"""What counting costs a pull of 512 blocks of 64 KiB: with the counters, and with none, in turn.

    python -m benchmarks.bench_observe [--json FILE]

The baseline is the same pull with a log that does nothing. Both are measured in one process, one
after the other in each round, and the medians of all rounds are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import llm_datadist_torch as ld

BLOCKS, BLOCK_BYTES = 512, 64 * 1024


class NoLog:
    """Counts nothing."""

    def record(self, *_: object) -> None:
        """Nothing."""

    def failed(self, *_: object) -> None:
        """Nothing."""


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    size = {"layers": 1, "blocks": BLOCKS, "shape": (BLOCK_BYTES // 2,), "dtype": torch.uint8}
    times: dict[str, list[int]] = {"counted": [], "not counted": []}
    with ld.open(listen="127.0.0.1:0") as owner, ld.open() as node:
        owner.allocate(name="kv", **size)
        target = node.allocate(**size)
        order = torch.randperm(BLOCKS)
        pull = node.connect(owner.address).prepare_pull("kv", target, order, torch.arange(BLOCKS))
        instance = node.datadist._instance  # noqa: SLF001
        logs = {"counted": instance.transfers, "not counted": NoLog()}
        for number in range(args.rounds + 5):
            for name in sorted(logs, reverse=bool(number % 2)):
                instance.transfers = logs[name]
                began = time.perf_counter_ns()
                pull.run()
                if number >= 5:
                    times[name].append(time.perf_counter_ns() - began)
        began = time.perf_counter_ns()
        for _ in range(10_000):
            logs["counted"].record("pull_blocks", 1, "path", 1, began)
        one_call_us = (time.perf_counter_ns() - began) / 10_000 / 1000
    medians = {name: statistics.median(each) / 1000 for name, each in times.items()}
    ratio = medians["counted"] / medians["not counted"]
    share = one_call_us / medians["not counted"]
    print(f"{'':14}{'median us':>12}")
    for name, median in medians.items():
        print(f"{name:14}{median:12.1f}")
    print(f"ratio {ratio:.4f}; one call of record() {one_call_us:.2f} us, {share:.3%} of the pull")
    if args.json:
        found = {"median_us": medians, "ratio": ratio, "record_us": one_call_us, "share": share}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
