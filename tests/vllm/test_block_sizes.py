# SPDX-License-Identifier: Apache-2.0
"""Blocks of 128 tokens at one end, of 256 at the other: both ways, and with cached prefixes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.vllm.conftest import MODULE, Engines, random_prompts, tokens_of
from tests.vllm.engines import ROOT, Engine

pytestmark = pytest.mark.timeout(600)

LENGTHS = (33, 128, 129, 256, 257, 511, 900)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with blocks of 256 tokens, that serves and pulls."""
    directory = tmp_path_factory.mktemp("wide")
    # The model's name is compared, not where it is.
    command = [sys.executable, "examples/vllm/tiny_model.py", str(directory / "model")]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    engine = Engine(
        directory / "model",
        directory / "wide.log",
        connector={"verify": True},
        module=MODULE,
        block_size=256,
    )
    try:
        engine.wait_until_ready()
        yield engine
    finally:
        engine.close()


def keep(count: int) -> list[dict[str, bool]]:
    return [{"do_remote_decode": True}] * count


def test_from_128_to_256(engines: Engines, wide: Engine) -> None:
    prompts = random_prompts(*LENGTHS, seed=31)
    answers = wide.generate(prompts, 12, engines.prefill("p1", prompts))
    assert tokens_of(answers) == engines.right(prompts, 12)
    # All came from the producer but the last token.
    assert "was not fetched" not in wide.text()
    assert [answer["cached"] for answer in answers] == [length - 1 for length in LENGTHS]


def test_from_256_to_128(engines: Engines, wide: Engine) -> None:
    prompts = random_prompts(*LENGTHS, seed=32)
    params = [answer["params"] for answer in wide.generate(prompts, 1, keep(len(prompts)))]
    before = engines["d1"].text().count("was not fetched")
    answers = engines["d1"].generate(prompts, 12, params)
    assert tokens_of(answers) == engines.right(prompts, 12)
    assert engines["d1"].text().count("was not fetched") == before
    assert [answer["cached"] for answer in answers] == [length - 1 for length in LENGTHS]


def test_only_what_is_not_cached_is_moved(engines: Engines, wide: Engine) -> None:
    (prefix,) = random_prompts(600, seed=33)
    for tail in random_prompts(40, 300, seed=34):
        prompts = [prefix + tail]
        answers = wide.generate(prompts, 12, engines.prefill("p2", prompts))
        assert tokens_of(answers) == engines.right(prompts, 12)
    assert "was not fetched" not in wide.text()
