# SPDX-License-Identifier: Apache-2.0
"""Prefill in one vLLM engine, the first token in another: this connector and vLLM's NixlConnector.

Run it with the environment of `make test-vllm`: .venv-vllm/bin/python -m benchmarks.bench_vllm

    python -m benchmarks.bench_vllm --json benchmarks/results/vllm.json    # all of it
    python -m benchmarks.bench_vllm --piece 0 --out 0.json                 # or pair by pair
    python -m benchmarks.bench_vllm --piece 1 --out 1.json                 # the other connector's
    python -m benchmarks.bench_vllm --merge 0.json 1.json --json benchmarks/results/vllm.json

*Added* is what the hand-over adds to the time of the first token: the time at the consumer with the
KV fetched, less that of the same prompt when its KV is in the consumer's prefix cache. That cache
has full blocks only, and a consumer that has fetched a prompt computes one token; so the second
prompt ends one token after its last full block, and one token is computed for it, too.
Engines are asked through a pipe, alike for both.

Engines of vLLM spin for a second after their last work, and NIXL's threads for as long as there are
any. So a prompt is asked for when both engines have come to rest, as on hosts of their own; and a
connector's producer and consumer have the host for themselves, and are started in turn
with the other connector's, several times, with the same prompts; which of them comes first changes.
All engines have computed prompts of all lengths by themselves before. The first hand-over, when
nothing is linked, is a row of its own; so are many prompts at once, which say how many requests a
consumer takes over per second.

NIXL's agents take the network interfaces that are there when they start, and transfers fail when
other programs make and remove some; so all engines have UCX use the loopback device, beside shared
memory.

Stalls are how long the engine's loop was held in a hook of the connector (see vllm_probe.py)."""

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.vllm_probe import VARIABLE
from tests.vllm.engines import Engine

LENGTHS = (129, 300, 900, 4000)
MAX_TOKENS = 4096
GOAL_RATIO, GOAL_STALL_MS = 0.25, 2.0
CONNECTORS = ("ProbedOurs", "ProbedNixl")
FIRST_PORT = 21_600
FIRST = "first"
"""The row of the first hand-over, of the shortest length."""
AT_ONCE, AT_ONCE_LENGTH, AT_ONCE_EVERY = 32, 300, 3
"""Prompts that are asked for at once, their tokens, and after how many rounds."""
MANY = f"{AT_ONCE} x {AT_ONCE_LENGTH}"
"""Their row."""
BLOCK = 128
"""Tokens of a block of vLLM's on CPUs."""
SPIN_S = 1.3
"""How long an engine without work spins, and some more."""
LOG_BYTES = 4000


class Pair:
    """A producer and a consumer with one connector."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.engines: dict[str, Engine] = {}
        self._directory = directory
        for role in ("kv_producer", "kv_consumer"):
            port = FIRST_PORT + 2 * CONNECTORS.index(name) + (role == "kv_consumer")
            self.engines[role] = Engine(
                directory / "model",
                directory / f"{name}-{role}.log",
                in_process=False,
                environment={
                    VARIABLE: str(directory / f"{name}-{role}.jsonl"),
                    "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port),
                    "UCX_NET_DEVICES": "lo",
                },
                max_model_len=MAX_TOKENS,
                kv_transfer_config={
                    "kv_connector": name,
                    "kv_connector_module_path": "benchmarks.vllm_probe",
                    "kv_role": role,
                    "kv_buffer_device": "cpu",
                },
            )

    def cpu_s(self) -> float:
        """CPU time of all processes of both engines until now."""
        groups = {engine.pid for engine in self.engines.values()}
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) in groups:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def warm_up(self, numbers: random.Random) -> None:
        """Have both engines compute, without the connector."""
        for engine in self.engines.values():
            for length in LENGTHS:
                engine.generate([random_prompt(numbers, length)], 1)

    def first_tokens(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Seconds with the KV fetched and with the KV there, and the tokens.

        Raises:
            SystemExit: The consumer's tokens are not those of the KV in its prefix cache.
        """
        keep = [{"do_remote_decode": True}] * len(prompts)
        kept = self.engines["kv_producer"].generate(prompts, 1, keep)
        params = [each["params"] for each in kept]
        consumer = self.engines["kv_consumer"]
        time.sleep(SPIN_S)
        cpu = self.cpu_s()
        seconds, fetched = timed(consumer, prompts, params)
        cpu = self.cpu_s() - cpu
        tokens = [each["tokens"] for each in fetched]
        if tokens != [each["tokens"] for each in consumer.generate(prompts, 1)]:
            logs = "\n".join(each.text()[-LOG_BYTES:] for each in self.engines.values())
            raise SystemExit(f"{self.name}: wrong tokens: {fetched}\n{logs}")
        time.sleep(SPIN_S)
        cached, _ = timed(consumer, [one_past_a_block(prompt) for prompt in prompts])
        return {
            "connector": self.name,
            "tokens": tokens,
            "fetched": seconds,
            "cached": cached,
            "cpu": cpu,
        }

    def noted(self) -> list[dict[str, Any]]:
        """What the probes have noted: pulls and hooks."""
        probes = self._directory.glob(f"{self.name}-*.jsonl.*")
        return [
            json.loads(line)
            for probe in probes
            for line in probe.read_text(encoding="utf-8").splitlines()
        ]

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def timed(
    engine: Engine, prompts: list[list[int]], params: list[dict[str, Any]] | None = None
) -> tuple[float, list[dict[str, Any]]]:
    """The seconds that an engine takes for the first tokens, and what it answers."""
    start = time.perf_counter()
    answers = engine.generate(prompts, 1, params)
    return time.perf_counter() - start, answers


def one_past_a_block(prompt: list[int]) -> list[int]:
    """Its beginning that ends one token after a full block."""
    return prompt[: (len(prompt) - 1) // BLOCK * BLOCK + 1]


def random_prompt(numbers: random.Random, length: int) -> list[int]:
    return [numbers.randrange(3, 1024) for _ in range(length)]


def measure(
    connector: str, directory: Path, start: int, rounds: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Start a pair, and measure; results, and what its probes noted."""
    # The same for both connectors.
    numbers = random.Random(start)
    directory.mkdir()
    command = [sys.executable, "examples/vllm/tiny_model.py", str(directory / "model")]
    subprocess.run(command, check=True, cwd=common.ROOT)
    pair = Pair(connector, directory)
    try:
        for engine in pair.engines.values():
            engine.wait_until_ready()
        pair.warm_up(numbers)
        cases = [(FIRST, [random_prompt(numbers, LENGTHS[0])])]
        for round_number in range(rounds):
            cases += [(str(length), [random_prompt(numbers, length)]) for length in LENGTHS]
            if round_number % AT_ONCE_EVERY == 0:
                many = [random_prompt(numbers, AT_ONCE_LENGTH) for _ in range(AT_ONCE)]
                cases.append((MANY, many))
        results = [{"row": row, **pair.first_tokens(prompts)} for row, prompts in cases]
        return results, pair.noted()
    finally:
        pair.close()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Of one value: that one."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def report_latency(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print("| tokens | connector | n | first token, ms | KV there | added | (quartiles) | CPU, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name in (FIRST, *map(str, LENGTHS), MANY):
        for connector in CONNECTORS:
            these = [r for r in results if r["row"] == name and r["connector"] == connector]
            medians = {
                key: 1000 * statistics.median(each[key] for each in these)
                for key in ("fetched", "cached", "cpu")
            }
            added = [1000 * (each["fetched"] - each["cached"]) for each in these]
            low, middle, high = quartiles(added)
            row = {"row": name, "connector": connector, "count": len(these), "added": middle}
            if name == MANY:
                row["requests_per_s"] = 1000 * AT_ONCE / medians["fetched"]
            rows.append({**row, "quartiles": [low, high], **medians})
            print(
                f"| {name} | {connector.removeprefix('Probed')} | {len(these)} |"
                f" {medians['fetched']:.1f} | {medians['cached']:.1f} | {middle:.1f} |"
                f" {low:.1f} to {high:.1f} | {medians['cpu']:.0f} |"
            )
        ratio = rows[-2]["added"] / rows[-1]["added"]
        print(f"added, ours / NIXL: {ratio:.2f} (goal: at most {GOAL_RATIO})")
    return rows


def report_stalls(noted: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print(f"milliseconds, p50 / p99 / most; goal: held at most {GOAL_STALL_MS}")
    for connector, lines in noted.items():
        samples: dict[str, list[dict[str, float]]] = {}
        for line in lines:
            samples.setdefault("pull" if "pull" in line else line["hook"], []).append(line)
        pulls = common.quantiles_ms([each["pull"] for each in samples.pop("pull")])
        print(f"{connector.removeprefix('Probed')}: pulls {pulls[0]:.1f} / {pulls[1]:.1f}")
        print("| hook | calls | by the clock | held | CPU |")
        print("|---|---|---|---|---|")
        for hook, these in sorted(samples.items()):
            columns = {
                key: common.quantiles_ms([each[key] for each in these])
                for key in ("s", "held", "cpu")
            }
            told = " | ".join(" / ".join(f"{ms:.2f}" for ms in each) for each in columns.values())
            print(f"| {hook} | {len(these)} | {told} |")
            rows.append({"connector": connector, "hook": hook, "pulls": pulls, **columns})
    return rows


def run_piece(number: int, rounds: int) -> dict[str, Any]:
    """One start of one connector's engines; which comes first changes from start to start."""
    start, turn = divmod(number, len(CONNECTORS))
    connector = CONNECTORS[:: 1 if start % 2 == 0 else -1][turn]
    environment = common.environment()
    with tempfile.TemporaryDirectory() as name:
        results, noted = measure(connector, Path(name) / connector, start, rounds)
    return {
        "environment": environment,
        "start": start,
        "connector": connector,
        "rounds": rounds,
        "load_after": os.getloadavg()[0],
        "results": results,
        "noted": noted,
    }


def merged(pieces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all pieces found, reported, as a file of results.

    Raises:
        SystemExit: They are of different machines, commits or lengths of a run, the connectors have
            not been started equally often, or have answered differently.
    """
    for name in ("cpu", "cores", "commit", "torch", "versions"):
        found = {json.dumps(piece["environment"][name]) for piece in pieces}
        if len(found) > 1:
            raise SystemExit(f"pieces with different {name} can't be merged: {sorted(found)}")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONNECTORS}
    noted: dict[str, list[dict[str, Any]]] = {name: [] for name in CONNECTORS}
    for piece in sorted(pieces, key=lambda piece: int(piece["start"])):
        results[piece["connector"]] += piece["results"]
        noted[piece["connector"]] += piece["noted"]
    mine, theirs = results.values()
    if [each["tokens"] for each in mine] != [each["tokens"] for each in theirs]:
        raise SystemExit("tokens differ, or the connectors have other starts or rounds")
    first = dict(pieces[0]["environment"])
    starts, rounds = len(pieces) // len(CONNECTORS), pieces[0]["rounds"]
    first["command"] = f"python -m benchmarks.bench_vllm --starts {starts} --rounds {rounds}"
    first["load_before"] = max(piece["environment"]["load_before"] for piece in pieces)
    first["loads"] = [
        {name: piece[name] for name in ("start", "connector")}
        | {"before": piece["environment"]["load_before"], "after": piece["load_after"]}
        for piece in pieces
    ]
    return {"environment": first, "results": report_latency(mine + theirs) + report_stalls(noted)}


def read(path: Path) -> dict[str, Any]:
    """A piece that was written before."""
    piece: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return piece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="prompts per length and start")
    parser.add_argument("--starts", type=int, default=3, help="times that the engines are started")
    parser.add_argument("--json", type=Path, help="file for the figures of all")
    parser.add_argument("--piece", type=int, help="only this pair of engines, from 0 on")
    parser.add_argument("--out", type=Path, help="with --piece: file for what it has found")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing: of these pieces")
    args = parser.parse_args()
    if (args.piece is None) != (args.out is None):
        parser.error("--piece and --out belong together")
    common.print_environment()
    if args.piece is not None:
        piece = run_piece(args.piece, args.rounds)
        args.out.write_text(json.dumps(piece) + "\n", encoding="utf-8")
        return
    if args.merge:
        pieces = [read(path) for path in args.merge]
    else:
        count = args.starts * len(CONNECTORS)
        pieces = [run_piece(number, args.rounds) for number in range(count)]
    record = merged(pieces)
    print(f"load now {os.getloadavg()[0]:.1f}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
