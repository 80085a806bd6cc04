# SPDX-License-Identifier: Apache-2.0
"""Kinds of models and ways to run them that take minutes: the tokens are those of one engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.service import eventually
from tests.vllm.conftest import BLOCK_BYTES, MODULE, random_prompts, tokens_of
from tests.vllm.engines import Engine, close_all, make_model, start_all

pytestmark = [pytest.mark.timeout(900), pytest.mark.thorough]

LENGTHS = (33, 129, 300, 900)
KEEP = {"do_remote_decode": True}
SIZES: dict[str, Any] = {"block_size": 32, "kv_cache_memory_bytes": 32 << 20}
FREE_BLOCKS = SIZES["kv_cache_memory_bytes"] // (BLOCK_BYTES // 4) - 1
"""Of an idle engine: one block is nobody's."""
CONNECTED: dict[str, Any] = {"module": MODULE, "connector": {"verify": True, "timeout_s": 60.0}}
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 8}
STAGES: dict[str, Any] = {
    "pipeline_parallel_size": 2,
    "in_process": False,
    # vLLM's CPU backend makes the buffers of later stages when it warms up, and it does not warm
    # up an engine whose model is not traced.
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}


def ours(_: Path) -> dict[str, Any]:
    """This connector, as one of several."""
    return {
        "kv_connector": "LLMDataDistConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": MODULE,
        "kv_connector_extra_config": {"verify": True, "timeout_s": 60.0, "claim_s": 120.0},
    }


def store(directory: Path) -> dict[str, Any]:
    """vLLM's example of a connector: it stores prompts as files."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(directory / "store")},
    }


def offloading(_: Path) -> dict[str, Any]:
    """vLLM's offloading of blocks that may leave the engine's cache."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "HostOffloadingSpec",
            "spec_module_path": "tests.vllm.host_offloading",
            "cpu_bytes_to_use": 32 << 20,
        },
    }


def several(directory: Path, *connectors: Any) -> dict[str, Any]:
    """An engine with several connectors, this one among them."""
    return {
        "kv_transfer_config": {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"connectors": [each(directory) for each in connectors]},
        }
    }


@dataclass(frozen=True)
class Case:
    """What is particular to a producer and a consumer.

    Attributes:
        kind: Of the model.
        producer: Arguments of ``Engine``.
        connectors: The consumer's, if it has several.
    """

    kind: str = "llama"
    producer: dict[str, Any] = field(default_factory=dict)
    connectors: tuple[Any, ...] = ()


CASES = {
    "short-convolutions": Case("lfm2"),
    "pipeline": Case(producer=STAGES),
    "before-a-store": Case(connectors=(ours, store)),
    "after-a-store": Case(connectors=(store, ours)),
    "before-offloading": Case(connectors=(ours, offloading)),
    "after-offloading": Case(connectors=(offloading, ours)),
}


@pytest.fixture(scope="module", params=CASES)
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Engine]]:
    """One that does all of it, a producer that computes in chunks, and a consumer."""
    case = CASES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    model = directory / "model"
    make_model(model, case.kind)
    consumer = several(directory, *case.connectors) if case.connectors else CONNECTED
    arguments: dict[str, dict[str, Any]] = {
        "whole": {"enable_prefix_caching": False},
        "p": CONNECTED | CHUNKED | case.producer,
        "d": {"policy": "fail"} | consumer,
    }
    engines: dict[str, Engine] = {}

    def made() -> Iterator[Engine]:
        for name, given in arguments.items():
            engines[name] = Engine(model, directory / f"{name}.log", **SIZES | given)
            yield engines[name]

    try:
        start_all(made())
        yield engines
    finally:
        close_all(engines.values())


def hand_over(engines: dict[str, Engine], prompt: list[int]) -> list[list[int]]:
    """Prefill at one engine, decode at the other; the tokens."""
    (kept,) = engines["p"].generate([prompt], 1, [KEEP])
    return tokens_of(engines["d"].generate([prompt], 12, [kept["params"]]))


def test_tokens(engines: dict[str, Engine]) -> None:
    # One by one: some of vLLM's kernels compute other tokens for a batch than for a prompt alone.
    for prompt in random_prompts(*LENGTHS, seed=70):
        right = tokens_of(engines["whole"].generate([prompt], 12))
        assert hand_over(engines, prompt) == right, len(prompt)
    assert "was not fetched" not in engines["d"].text()
    assert "is computed here" not in engines["d"].text()


@pytest.mark.parametrize("engines", ["before-offloading", "after-offloading"], indirect=True)
def test_what_was_handed_over_is_offloaded(engines: dict[str, Engine]) -> None:
    """Blocks of the producer come back from where the other connector has stored them."""
    for prompt in random_prompts(129, 300, seed=71):
        right = tokens_of(engines["whole"].generate([prompt], 12))
        assert hand_over(engines, prompt) == right
        assert eventually(engines["d"].reset_prefix_cache)
        (alone,) = engines["d"].generate([prompt], 12)
        assert alone["tokens"] == right[0]
        assert alone["cached"] >= 128
        # The producer's blocks are given back, whichever connector loads the prompt.
        assert eventually(engines["d"].reset_prefix_cache)
        assert hand_over(engines, prompt) == right
    assert eventually(lambda: engines["p"].state()["free_blocks"] == FREE_BLOCKS)
