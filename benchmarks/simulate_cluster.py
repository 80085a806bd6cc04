# SPDX-License-Identifier: Apache-2.0
"""What a deployment of many instances would do: a discrete-event simulation of its control plane.

Every decode instance is linked with every prefill instance and pulls from them at random. Each
instance has one endpoint thread, which serves messages one after the other; what a message costs it
is taken from the JSON of ``bench_links`` or ``growth``. Bytes are not simulated: they do not pass
that thread.

``python -m benchmarks.simulate_cluster --costs benchmarks/results/growth.json``
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import simpy

Steps: TypeAlias = Generator[simpy.Event, None, None]


@dataclass(frozen=True)
class Costs:
    """What things cost, in microseconds of an endpoint's thread, KiB and descriptors.

    Attributes:
        dial_us: Making one link, at the side that dials.
        accept_us: The same at the other side.
        ask_us: One pull, at the side that pulls.
        answer_us: One pull, at the owner.
        wire_us: From one endpoint to another. An assumption: no network was measured.
        setup_messages: Messages to make a link.
        pull_messages: Messages of a pull.
        instance_kib: An instance without links.
        dialed_kib: A link, at the side that dialed it.
        accepted_kib: A link, at the other side.
        dialed_fds: Descriptors of a link, at the side that dialed it.
        accepted_fds: The same at the other side.
    """

    dial_us: float
    accept_us: float
    ask_us: float
    answer_us: float
    wire_us: float
    setup_messages: float = 2.0
    pull_messages: float = 3.0
    instance_kib: float = 0.0
    dialed_kib: float = 0.0
    accepted_kib: float = 0.0
    dialed_fds: float = 0.0
    accepted_fds: float = 0.0

    @classmethod
    def measured(cls, path: Path, wire_us: float) -> Costs:
        """From the JSON of ``bench_links`` or ``growth``: the case with the most links.

        What it timed for both sides together counts for each of them, so this errs upwards.
        """
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        results = results["peers"] if isinstance(results, dict) else results
        case = max(results, key=lambda result: result["links"])
        setup_us = case["warm_ms"] * 1e3 / case["links"]
        return cls(
            dial_us=setup_us,
            accept_us=setup_us,
            ask_us=case["pull_cpu_us"],
            answer_us=case["pull_owner_cpu_us"],
            wire_us=wire_us,
            setup_messages=case["messages_per_setup"],
            pull_messages=case["pull_messages"],
            **{
                name: case[name]
                for name in (
                    "instance_kib", "dialed_kib", "accepted_kib", "dialed_fds", "accepted_fds"
                )
            },
        )  # fmt: skip


@dataclass(frozen=True)
class Deployment:
    """So many instances, and what is asked of them.

    Attributes:
        prefill: Instances that own caches.
        decode: Instances that pull; each dials every prefill instance.
        pulls_per_s: Of each decode instance, at random times.
    """

    prefill: int
    decode: int
    pulls_per_s: float


class EndpointThread:
    """Serves one thing after the other, in the order in which they came."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.free_at = 0.0
        self.busy_us = 0.0

    def serve(self, us: float) -> simpy.Event:
        """An event that happens when this, and all that came before, is done."""
        self.busy_us += us
        self.free_at = max(self.free_at, self.env.now) + us
        return self.env.timeout(self.free_at - self.env.now)


def simulate_setup(costs: Costs, deployment: Deployment) -> float:
    """Seconds until all links are made, when all decode instances start at once.

    Each dials one prefill instance after the other, beginning with another one than its neighbour,
    as a scheduler that means well would have it. So links reach the prefill instances step by step,
    and need no queue of events.
    """
    if not deployment.prefill or not deployment.decode:
        return 0.0
    free_at = [0.0] * deployment.prefill
    for step in range(deployment.prefill):
        arrives = (step + 1) * costs.dial_us + costs.wire_us
        for number in range(deployment.decode):
            owner = (number + step) % deployment.prefill
            free_at[owner] = max(free_at[owner], arrives) + costs.accept_us
    return (max(free_at) + costs.wire_us) / 1e6


def simulate_service(
    costs: Costs, deployment: Deployment, seconds: float, seed: int
) -> dict[str, float]:
    """Pulls for a while.

    Returns:
        Microseconds from a pull's question to its answer (median and 99th percentile), and which
        part of the time the endpoint threads are busy.
    """
    env, rng = simpy.Environment(), random.Random(seed)
    prefill = [EndpointThread(env) for _ in range(deployment.prefill)]
    decode = [EndpointThread(env) for _ in range(deployment.decode)]
    latencies: list[float] = []

    def pull(puller: EndpointThread, owner: EndpointThread) -> Steps:
        start = env.now
        yield puller.serve(costs.ask_us)
        yield env.timeout(costs.wire_us)
        yield owner.serve(costs.answer_us)
        yield env.timeout(costs.wire_us)
        latencies.append(float(env.now - start))

    def pulls(puller: EndpointThread) -> Steps:
        while True:
            yield env.timeout(rng.expovariate(deployment.pulls_per_s) * 1e6)
            env.process(pull(puller, rng.choice(prefill)))

    if deployment.pulls_per_s:
        for thread in decode:
            env.process(pulls(thread))
    env.run(until=seconds * 1e6)
    latencies.sort()
    count = len(latencies)
    return {
        "pulls": count,
        "p50_us": latencies[count // 2] if count else 0.0,
        "p99_us": latencies[count * 99 // 100] if count else 0.0,
        "prefill_busy": sum(each.busy_us for each in prefill) / len(prefill) / seconds / 1e6,
        "decode_busy": sum(each.busy_us for each in decode) / len(decode) / seconds / 1e6,
    }


def arithmetic(costs: Costs, deployment: Deployment) -> dict[str, float]:
    """What needs no simulation: memory, descriptors and messages."""
    links = deployment.prefill * deployment.decode
    per_prefill_kib = costs.instance_kib + deployment.decode * costs.accepted_kib
    per_decode_kib = costs.instance_kib + deployment.prefill * costs.dialed_kib
    return {
        "links": links,
        "prefill_mib": per_prefill_kib / 1024,
        "decode_mib": per_decode_kib / 1024,
        "prefill_fds": deployment.decode * costs.accepted_fds,
        "decode_fds": deployment.prefill * costs.dialed_fds,
        "setup_messages": links * costs.setup_messages,
        "pull_messages_per_s": deployment.decode * deployment.pulls_per_s * costs.pull_messages,
    }


def study(costs: Costs, deployment: Deployment, seconds: float, seed: int) -> dict[str, Any]:
    """All of it for one deployment."""
    return (
        asdict(deployment)
        | arithmetic(costs, deployment)
        | {"setup_s": simulate_setup(costs, deployment)}
        | simulate_service(costs, deployment, seconds, seed)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--costs", type=Path, required=True, help="JSON of bench_links or growth")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 128, 1000])
    parser.add_argument("--pulls", type=float, default=10.0, help="per decode instance and second")
    parser.add_argument("--seconds", type=float, default=5.0, help="of simulated service")
    parser.add_argument("--wire-us", type=float, default=50.0, help="assumed, one way")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    costs = Costs.measured(args.costs, args.wire_us)
    print(", ".join(f"{name} {value:.1f}" for name, value in asdict(costs).items()))
    results = []
    for size in args.sizes:
        deployment = Deployment(size, size, args.pulls)
        result = study(costs, deployment, args.seconds, args.seed)
        results.append(result)
        print(f"{size} x {size}")
        for name, value in result.items():
            print(f"  {name:26s} {value:14,.2f}")
    if args.json is not None:
        record = {"costs": asdict(costs), "seed": args.seed, "results": results}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
