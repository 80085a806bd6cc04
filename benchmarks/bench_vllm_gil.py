# SPDX-License-Identifier: Apache-2.0
"""How long the connector's threads keep the GIL from the engine's loop during pulls.

A worker of the connector in this process, with tensors of vLLM's kind and without vLLM, pulls the
KV of 900 tokens from one in another process, again and again. Meanwhile this thread, as the
engine's loop would, gives up the GIL and takes it again all the time; what it waits for is either
the GIL or a processor, and the kernel says how long it waited for one of those. The same without
pulls is the control."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import common
from benchmarks.schedstat import queued_s
from llm_datadist_torch.vllm.params import RemoteBlocks
from llm_datadist_torch.vllm.steps import Pull, Step
from tests.vllm_parts.workers import Worker

TOKENS, BLOCK = 900, 32
BLOCKS = tuple(range(1, -(-TOKENS // BLOCK) + 1))


def serve(pulls: int) -> None:
    """The producer: what it has for each pull, then until stdin ends."""
    worker = Worker(len(BLOCKS) + 1, 1, claim_s=3600.0, lease_s=3600.0)
    told = [worker.grant(list(BLOCKS), TOKENS) for _ in range(pulls)]
    print(json.dumps([remote.to_params() for remote in told]), flush=True)
    sys.stdin.read()
    worker.half.close()


def moment() -> tuple[float, float]:
    """Seconds queued and the time, with nothing between the two."""
    while True:
        queued, now = queued_s(), time.perf_counter()
        if queued_s() == queued:
            return queued, now


def longest(worker: Worker, remote: RemoteBlocks | None) -> float:
    """Longest time, in seconds, that this thread waited for the GIL during one pull, or 20 ms."""
    most, end = 0.0, time.perf_counter() + 0.02
    if remote is not None:
        worker.half.step(Step(pulls=[Pull("d", remote, (BLOCKS,), 0, TOKENS)]))
    queued, last = moment()
    while True:
        now_queued, now = moment()
        most = max(most, now - last - (now_queued - queued))
        queued, last = now_queued, now
        if remote is None:
            if now > end:
                return most
            continue
        done = worker.half.take_done()
        if done.failed:
            raise SystemExit("a pull failed")
        if done.received:
            return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pulls", type=int, default=300)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.serve:
        serve(args.pulls)
        return
    common.print_environment()
    command = [sys.executable, "-m", "benchmarks.bench_vllm_gil", "--serve"]
    command += ["--pulls", str(args.pulls)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as producer:
        assert producer.stdin is not None
        assert producer.stdout is not None
        told = [RemoteBlocks.of(each) for each in json.loads(producer.stdout.readline())]
        worker = Worker(len(BLOCKS) + 1, 2)
        rows: dict[str, tuple[float, float, float]] = {}
        waits: dict[str, list[float]] = {"first pull": [], "pulls": [], "no pulls": []}
        for at, remote in enumerate(told):
            waits["pulls" if at else "first pull"].append(longest(worker, remote))
            waits["no pulls"].append(longest(worker, None))
        for name, values in waits.items():
            rows[name] = common.quantiles_ms(values)
            shown = " / ".join(f"{ms:.2f}" for ms in rows[name])
            print(f"{name} ({len(values)}): longest wait for the GIL, p50 / p99 / most: {shown} ms")
        worker.half.close()
        producer.stdin.close()
    common.save(args.json, rows)


if __name__ == "__main__":
    main()
