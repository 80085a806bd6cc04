# SPDX-License-Identifier: Apache-2.0
"""Models with other KV than one dense group: the tokens are those of one engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.vllm.conftest import MODULE, random_prompts, tokens_of
from tests.vllm.engines import Engine, close_all, make_model, start_all

pytestmark = pytest.mark.timeout(900)

SIZES = {"block_size": 32, "kv_cache_memory_bytes": 32 << 20}
LENGTHS = (33, 129, 300, 900)


@pytest.fixture(scope="module", params=["gemma3", "mistral"])
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Engine]]:
    """One that does all of it, a producer that computes in chunks, and a consumer."""
    directory = tmp_path_factory.mktemp(request.param)
    model = directory / "model"
    make_model(model, request.param)
    connected: dict[str, Any] = {"module": MODULE, "connector": {"verify": True, "timeout_s": 60.0}}
    arguments: dict[str, dict[str, Any]] = {
        "whole": {"enable_prefix_caching": False},
        "p": {**connected, "max_num_batched_tokens": 256, "max_num_seqs": 8},
        "d": {**connected, "policy": "fail"},
    }
    engines: dict[str, Engine] = {}

    def made() -> Iterator[Engine]:
        for name, given in arguments.items():
            engines[name] = Engine(model, directory / f"{name}.log", **SIZES, **given)
            yield engines[name]

    try:
        start_all(made())
        yield engines
    finally:
        close_all(engines.values())


def test_tokens(engines: dict[str, Engine]) -> None:
    prompts = random_prompts(*LENGTHS, seed=70)
    right = tokens_of(engines["whole"].generate(prompts, 12))
    keep = [{"do_remote_decode": True}] * len(prompts)
    params = [each["params"] for each in engines["p"].generate(prompts, 1, keep)]
    assert tokens_of(engines["d"].generate(prompts, 12, params)) == right
    assert "was not fetched" not in engines["d"].text()


def test_a_failed_load_ends_that_request_alone(engines: dict[str, Engine]) -> None:
    prompts = random_prompts(200, 300, seed=71)
    right = tokens_of(engines["whole"].generate(prompts, 12))
    keep = [{"do_remote_decode": True}] * len(prompts)
    params = [each["params"] for each in engines["p"].generate(prompts, 1, keep)]
    # A lease of another life.
    params[0]["remote_peers"][0][3] = "another"
    failed, loaded = engines["d"].generate(prompts, 12, params)
    assert (failed["finish_reason"], failed["tokens"]) == ("error", [])
    assert loaded["tokens"] == right[1]
