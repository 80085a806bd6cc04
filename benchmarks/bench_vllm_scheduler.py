# SPDX-License-Identifier: Apache-2.0
"""How long the connector's hooks hold a scheduler that has many long prompts waiting; no vLLM.

CPU time of the calling thread, milliseconds, and the goal that no hook takes more than 2. In each
step vLLM asks for the matched tokens of all waiting requests: that row is of all of them together.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common
from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.scheduler.prompts import Prompts
from llm_datadist_torch.vllm.scheduler.pull import PullScheduler
from tests.vllm_parts.test_scheduling import Request

GOAL_MS = 2.0
BLOCK = 128


def timed(hook: Callable[..., Any], *args: object) -> tuple[float, Any]:
    start = time.thread_time()
    told = hook(*args)
    return 1000 * (time.thread_time() - start), told


def scheduler() -> PullScheduler:
    made = PullScheduler("engine", 60.0, Prompts(), serves=True, pulls=True)
    made.set_workers([Peer(5, "127.0.0.1", 7000, "life")], 1)
    return made


def measure(num_requests: int, num_tokens: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds, by hook."""
    producer, consumer = scheduler(), scheduler()
    blocks = (tuple(range(1, 1 + -(-num_tokens // BLOCK))),)
    found: dict[str, list[float]] = {}

    def note(name: str, took: float) -> None:
        found.setdefault(name, []).append(took)

    requests = []
    for at in range(num_requests):
        prompt = [random.randrange(100_000) for _ in range(num_tokens)]
        kept = Request(f"p{at}", prompt, {"do_remote_decode": True}, num_tokens)
        took, _ = timed(producer.arrived, kept)
        note("a producer's request arrives", took)
        took, (_, params) = timed(lambda kept=kept: producer.finished(kept, blocks, completed=True))
        note("a producer's request ends", took)
        requests.append(Request(f"d{at}", prompt, json.loads(json.dumps(params))))
        note("a consumer's request arrives", timed(consumer.arrived, requests[-1])[0])
    for _ in range(steps):
        together = sum(timed(consumer.num_matched, each, 0)[0] for each in requests)
        note("matched tokens of all that wait", together)
        note("a step's plan", timed(consumer.take_step)[0])
    for request in requests:
        note("a request gets blocks", timed(consumer.allocated, request, blocks, num_tokens)[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common.print_environment()
    rows = []
    print("| hook | calls | median, ms | most, ms |")
    print("|---|---|---|---|")
    for name, took in measure(args.requests, args.tokens, args.steps).items():
        rows.append({"hook": name, "median_ms": statistics.median(took), "most_ms": max(took)})
        print(f"| {name} | {len(took)} | {statistics.median(took):.2f} | {max(took):.2f} |")
    print(f"goal: no median above {GOAL_MS}")
    common.save(args.json, rows)


if __name__ == "__main__":
    main()
