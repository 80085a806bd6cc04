# SPDX-License-Identifier: Apache-2.0
"""Prefill in one vLLM engine, the first token in another: this connector and vLLM's NixlConnector.

Run it with the environment of `make test-vllm`: .venv-vllm/bin/python -m benchmarks.bench_vllm

Four engines on this host, a producer and a consumer for each connector, take turns with the same
prompts. *Added* is what the hand-over adds to the time of the first token: the time at the consumer
with the KV fetched, less that of the same prompt asked again, when the KV is in the consumer's
prefix cache. Engines are asked through a pipe, alike for both. Stalls are the longest times that
the engine's loop was in one hook of the connector (see vllm_probe.py)."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.vllm_probe import VARIABLE
from tests.vllm.engines import Engine

LENGTHS = (129, 300, 900)
GOAL_RATIO, GOAL_STALL_MS = 0.5, 2.0
CONNECTORS = ("ProbedOurs", "ProbedNixl")
FIRST_PORT = 21_600


class Pair:
    """A producer and a consumer with one connector."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.engines: dict[str, Engine] = {}
        self._directory = directory
        for role in ("kv_producer", "kv_consumer"):
            probe = directory / f"{name}-{role}.jsonl"
            # Engines take it over when they start; one after the other.
            os.environ[VARIABLE] = str(probe)
            port = FIRST_PORT + 2 * CONNECTORS.index(name) + (role == "kv_consumer")
            os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
            self.engines[role] = Engine(
                directory / "model",
                directory / f"{name}-{role}.log",
                in_process=False,
                kv_transfer_config={
                    "kv_connector": name,
                    "kv_connector_module_path": "benchmarks.vllm_probe",
                    "kv_role": role,
                    "kv_buffer_device": "cpu",
                },
            )

    def cpu_s(self) -> float:
        """CPU time of all processes of both engines until now."""
        groups = {engine._process.pid for engine in self.engines.values()}  # noqa: SLF001
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) in groups:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def first_token(self, prompt: list[int]) -> dict[str, Any]:
        """Seconds with the KV fetched and with the KV there, and the token."""
        keep = [{"do_remote_decode": True}]
        params = self.engines["kv_producer"].generate([prompt], 1, keep)[0]["params"]
        consumer, cpu = self.engines["kv_consumer"], self.cpu_s()
        start = time.perf_counter()
        fetched = consumer.generate([prompt], 1, [params])[0]
        middle = time.perf_counter()
        cpu = self.cpu_s() - cpu
        cached = consumer.generate([prompt], 1)[0]
        end = time.perf_counter()
        if fetched["tokens"] != cached["tokens"]:
            raise SystemExit(f"{self.name}: wrong tokens: {fetched}, {cached}")
        return {
            "tokens": fetched["tokens"],
            "fetched": middle - start,
            "cached": end - middle,
            "cpu": cpu,
        }

    def noted(self) -> tuple[list[float], dict[str, list[float]]]:
        """Seconds of each pull, and of each hook the longest time and the most CPU time."""
        pulls: list[float] = []
        hooks: dict[str, list[float]] = {}
        for probe in self._probes():
            for line in probe.read_text(encoding="utf-8").splitlines():
                noted = json.loads(line)
                if "pull" in noted:
                    pulls.append(noted["pull"])
                else:
                    most = hooks.setdefault(noted["hook"], [0.0, 0.0])
                    most[:] = max(most[0], noted["s"]), max(most[1], noted["cpu"])
        return pulls, hooks

    def forget(self) -> None:
        """Begin to note anew."""
        for probe in self._probes():
            probe.write_text("", encoding="utf-8")

    def _probes(self) -> list[Path]:
        return list(self._directory.glob(f"{self.name}-*.jsonl.*"))

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def measure(pairs: list[Pair], rounds: int) -> list[dict[str, Any]]:
    numbers = random.Random(1)

    def once(length: int) -> list[dict[str, Any]]:
        prompt = [numbers.randrange(3, 1024) for _ in range(length)]
        took = [pair.first_token(prompt) for pair in pairs]
        if took[0]["tokens"] != took[1]["tokens"]:
            raise SystemExit(f"tokens differ: {took}")
        return [
            {"connector": pair.name, "length": length, **each}
            for pair, each in zip(pairs, took, strict=True)
        ]

    for length in LENGTHS:
        once(length)
    # Linking is done and every thread has run: what follows is a service's everyday.
    for pair in pairs:
        pair.forget()
    return [each for length in LENGTHS for _ in range(rounds) for each in once(length)]


def report(pairs: list[Pair], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print("| prompt | connector | first token, ms | KV there, ms | added, ms | CPU, ms |")
    print("|---|---|---|---|---|---|")
    for length in LENGTHS:
        for pair in pairs:
            these = [
                each
                for each in results
                if each["length"] == length and each["connector"] == pair.name
            ]
            medians = {
                name: 1000 * statistics.median(each[name] for each in these)
                for name in ("fetched", "cached", "cpu")
            }
            added = 1000 * statistics.median(each["fetched"] - each["cached"] for each in these)
            rows.append({"length": length, "connector": pair.name, "added": added, **medians})
            print(
                f"| {length} | {pair.name.removeprefix('Probed')} | {medians['fetched']:.1f} |"
                f" {medians['cached']:.1f} | {added:.1f} | {medians['cpu']:.0f} |"
            )
        ratio = rows[-2]["added"] / rows[-1]["added"]
        print(f"added, ours / NIXL: {ratio:.2f} (goal: at most {GOAL_RATIO})")
    for pair in pairs:
        pulls, hooks = pair.noted()
        pulls.sort()
        if len(pulls) < len(results) // len(pairs) // 2:
            raise SystemExit(f"{pair.name}: only {len(pulls)} pulls")
        worst = sorted(hooks, key=lambda name: -hooks[name][0])[:3]
        stalls = ", ".join(
            f"{name} {1000 * hooks[name][0]:.2f} ms ({1000 * hooks[name][1]:.2f} of CPU)"
            for name in worst
        )
        p50, p99 = statistics.median(pulls), pulls[min(len(pulls) - 1, int(0.99 * len(pulls)))]
        print(
            f"{pair.name.removeprefix('Probed')}: {len(pulls)} pulls, p50 {1000 * p50:.1f} ms,"
            f" p99 {1000 * p99:.1f} ms; longest in a hook: {stalls} (goal: {GOAL_STALL_MS} ms)"
        )
        rows.append({"connector": pair.name, "p50": p50, "p99": p99, "hooks": hooks})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="prompts per length")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common.print_environment()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        command = [sys.executable, "examples/vllm/tiny_model.py", str(directory / "model")]
        subprocess.run(command, check=True, cwd=common.ROOT)
        pairs = [Pair(connector, directory) for connector in CONNECTORS]
        try:
            for pair in pairs:
                for engine in pair.engines.values():
                    engine.wait_until_ready()
            rows = report(pairs, measure(pairs, args.rounds))
        finally:
            for pair in pairs:
                pair.close()
    print(f"load now {os.getloadavg()[0]:.1f}")
    common.save(args.json, rows)


if __name__ == "__main__":
    main()
