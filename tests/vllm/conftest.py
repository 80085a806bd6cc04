# SPDX-License-Identifier: Apache-2.0
"""Engines that all tests share: starting one takes longer than most tests."""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import Engine, close_all, make_model, start_all

MODULE = "llm_datadist_torch.vllm.connector"
BENT: dict[str, Any] = {"module": "tests.vllm.bent_connector", "name": "BentConnector"}
BLOCK_BYTES = 4 * 2 * 128 * 64 * 4
"""Of a block in fp32, all layers."""

# What each is for:
#   whole32, whole16: without a connector, what is right
#   p1, p2, d1, d2: fp32, all of them kv_both; the first of each with prefix caching, chunked
#       prefill and checksums; d2 has few blocks, and fails requests that could not be loaded
#   p16, d16: bf16, scheduler and worker in processes of their own, the connector as a plugin
#   push_p, push_d, push_d2: with "push", the first with chunked prefill, the others with checksums;
#       push_d fails requests whose blocks don't come, push_d2 computes them
#   victim1, victim2, push_victim: to be killed
ENGINES: dict[str, dict[str, Any]] = {
    "whole32": {"enable_prefix_caching": False},
    "whole16": {"enable_prefix_caching": False, "dtype": "bfloat16"},
    "p1": {
        "connector": {"verify": True},
        "module": MODULE,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
    },
    "p2": {"connector": {}, "module": MODULE, "enable_prefix_caching": False},
    "d1": {
        **BENT,
        "connector": {"verify": True, "timeout_s": 60.0},
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
    },
    "d2": {
        **BENT,
        "connector": {"timeout_s": 60.0},
        "policy": "fail",
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 26 * BLOCK_BYTES,
    },
    "p16": {
        "connector": {},
        "role": "kv_producer",
        "in_process": False,
        "dtype": "bfloat16",
    },
    "d16": {
        "connector": {},
        "role": "kv_consumer",
        "in_process": False,
        "dtype": "bfloat16",
    },
    "push_p": {
        "connector": {"mode": "push"},
        "role": "kv_producer",
        "module": MODULE,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
    },
    # Their ports are chosen when they start.
    "push_d": {
        "connector": {"mode": "push", "cluster_id": 77, "verify": True, "lease_s": 25.0},
        "role": "kv_consumer",
        "module": MODULE,
        "policy": "fail",
    },
    "push_d2": {
        "connector": {"mode": "push", "cluster_id": 177, "verify": True, "lease_s": 25.0},
        "role": "kv_consumer",
        "module": MODULE,
    },
    "push_victim": {**BENT, "connector": {"mode": "push"}, "role": "kv_producer"},
    "victim1": {**BENT, "connector": {"lease_s": 1.0}},
    "victim2": {"connector": {}, "module": MODULE},
}


def _lasting_port() -> int:
    """A free port of those that nobody is given who asks for any.

    The engine that listens there needs many seconds until it does.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(10_000, first), 100):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise AssertionError(f"no port of 100 between 10000 and {first} is free")


class Engines:
    """All engines by name, and what they have computed.

    Args:
        directory: Of their model, logs and bends.
        wanted: What each of them is, as `ENGINES` has it.
        models: Models of those that have another than the others.
    """

    def __init__(
        self,
        directory: Path,
        wanted: Mapping[str, Mapping[str, Any]],
        models: Mapping[str, Path] | None = None,
    ) -> None:
        self.model = directory / "model"
        make_model(self.model)
        self._directory = directory
        self._wanted = wanted
        self._models = models or {}
        self._made: dict[str, Engine] = {}
        self._numbers = itertools.count()
        self.push_peers: dict[str, tuple[int, str, int]] = {}
        self._right: dict[tuple[str, tuple[int, ...], int], list[int]] = {}
        self.bends = {name: directory / f"bends-{name}" for name in wanted}

    def start(self) -> None:
        """Start all, and wait until they are ready."""
        start_all(self._make(name, dict(given)) for name, given in self._wanted.items())

    def _make(self, name: str, arguments: dict[str, Any]) -> Engine:
        connector: dict[str, Any] = arguments.get("connector") or {}
        if "cluster_id" in connector:
            port = _lasting_port()
            self.push_peers[name] = (connector["cluster_id"], "127.0.0.1", port)
            arguments["connector"] = connector | {"port": port}
        self.bends[name].mkdir()
        log = self._directory / f"{name}.log"
        model = self._models.get(name, self.model)
        self._made[name] = Engine(model, log, bends=self.bends[name], **arguments)
        return self._made[name]

    def __getitem__(self, name: str) -> Engine:
        return self._made[name]

    def right(self, prompts: list[list[int]], max_tokens: int, dtype: int = 32) -> list[list[int]]:
        """The tokens of an engine that does all of it by itself."""
        whole = f"whole{dtype}"
        keys = [(whole, tuple(prompt), max_tokens) for prompt in prompts]
        for prompt, key in zip(prompts, keys, strict=True):
            if key not in self._right:
                (answer,) = self[whole].generate([prompt], max_tokens)
                self._right[key] = answer["tokens"]
        return [self._right[key] for key in keys]

    def hand_over(
        self, producer: str, consumer: str, prompts: list[list[int]], max_tokens: int
    ) -> list[dict[str, Any]]:
        """Prefill all prompts at the one, then decode at the other, which must not compute them."""
        before = self.num_not_fetched(consumer)
        answers = self[consumer].generate(prompts, max_tokens, self.prefill(producer, prompts))
        assert self.num_not_fetched(consumer) == before
        return answers

    def push_params(
        self, consumer: str, count: int
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """New transfers to a consumer: what its requests carry, and those of the producer."""
        names = [f"transfer-{next(self._numbers)}" for _ in range(count)]
        peers = [list(self.push_peers[consumer])]
        return (
            [{"do_remote_prefill": True, "transfer_id": name} for name in names],
            [
                {"do_remote_decode": True, "transfer_id": name, "remote_peers": peers}
                for name in names
            ],
        )

    def num_not_fetched(self, consumer: str) -> int:
        """Prompts that a consumer computed itself, or failed, because it could not load them."""
        return self[consumer].text().count("was not fetched")

    def prefill(self, producer: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """Prefill; what the consumer is to be given, per prompt."""
        keep = [{"do_remote_decode": True}] * len(prompts)
        return [each["params"] for each in self[producer].generate(prompts, 1, keep)]

    def close(self) -> None:
        close_all(self._made.values())


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    made = Engines(tmp_path_factory.mktemp("engines"), ENGINES)
    try:
        made.start()
        yield made
    finally:
        made.close()


def tokens_of(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def random_prompts(*lengths: int, seed: int) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(3, 1024) for _ in range(length)] for length in lengths]
