# SPDX-License-Identifier: Apache-2.0
"""Kinds of models and ways to run them that take minutes: the tokens are those of one engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import MODULE, random_prompts, tokens_of
from tests.vllm.engines import Engine, close_all, make_model

pytestmark = [pytest.mark.timeout(900), pytest.mark.thorough]

LENGTHS = (33, 129, 300, 900)
KEEP = {"do_remote_decode": True}
SIZES: dict[str, Any] = {"block_size": 32, "kv_cache_memory_bytes": 32 << 20}
CONNECTED: dict[str, Any] = {"module": MODULE, "connector": {"verify": True, "timeout_s": 60.0}}
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 8}


def several(*connectors: dict[str, Any]) -> dict[str, Any]:
    """An engine with several connectors, this one among them."""
    return {
        "kv_transfer_config": {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"connectors": list(connectors)},
        }
    }


OURS: dict[str, Any] = {
    "kv_connector": "LLMDataDistConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": MODULE,
    "kv_connector_extra_config": {"verify": True, "timeout_s": 60.0, "claim_s": 120.0},
}
STORE: dict[str, Any] = {
    "kv_connector": "ExampleConnector",
    "kv_role": "kv_both",
    # Replaced by a directory of the test.
    "kv_connector_extra_config": {"shared_storage_path": ""},
}


@dataclass(frozen=True)
class Case:
    """What is particular to a producer and a consumer, as arguments of ``Engine``."""

    kind: str = "llama"
    producer: dict[str, Any] = field(default_factory=dict)
    consumer: dict[str, Any] = field(default_factory=dict)


CASES = {
    "short-convolutions": Case("lfm2"),
    "pipeline": Case(producer={"pipeline_parallel_size": 2, "in_process": False}),
    "first-of-several": Case(consumer=several(OURS, STORE)),
    "last-of-several": Case(consumer=several(STORE, OURS)),
}


def made(model: Path, log: Path, given: dict[str, Any]) -> Engine:
    """An engine; another connector's files are beside its log."""
    if "kv_transfer_config" not in given:
        return Engine(model, log, **SIZES, **CONNECTED, **given)
    STORE["kv_connector_extra_config"]["shared_storage_path"] = str(log.with_suffix(".store"))
    return Engine(model, log, **SIZES, **given)


@pytest.fixture(params=CASES.values(), ids=CASES)
def engines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Engine]]:
    """One that does all of it, a producer that computes in chunks, and a consumer."""
    case: Case = request.param
    model = tmp_path / "model"
    make_model(model, case.kind)
    whole = {"enable_prefix_caching": False}
    engines = {"whole": Engine(model, tmp_path / "whole.log", **SIZES, **whole)}
    try:
        engines["p"] = made(model, tmp_path / "p.log", CHUNKED | case.producer)
        engines["d"] = made(model, tmp_path / "d.log", {"policy": "fail"} | case.consumer)
        for engine in engines.values():
            engine.wait_until_ready()
        yield engines
    finally:
        close_all(engines.values())


def test_tokens(engines: dict[str, Engine]) -> None:
    # One by one: some of vLLM's kernels compute other tokens for a batch than for a prompt alone.
    for prompt in random_prompts(*LENGTHS, seed=70):
        right = tokens_of(engines["whole"].generate([prompt], 12))
        (kept,) = engines["p"].generate([prompt], 1, [KEEP])
        (answer,) = engines["d"].generate([prompt], 12, [kept["params"]])
        assert [answer["tokens"]] == right, len(prompt)
    assert "was not fetched" not in engines["d"].text()
    assert "is computed here" not in engines["d"].text()
