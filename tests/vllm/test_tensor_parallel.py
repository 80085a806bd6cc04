# SPDX-License-Identifier: Apache-2.0
"""Two workers at one end, one at the other: each has its own heads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.conftest import BENT, Engines, random_prompts, tokens_of
from tests.vllm.engines import Engine

pytestmark = pytest.mark.timeout(1200)

LENGTHS = (33, 129, 300, 900)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("split")


@pytest.fixture(scope="module")
def split(engines: Engines, directory: Path) -> Iterator[Engine]:
    """An engine of two workers, that serves and pulls."""
    # The weights are compared, not where they are.
    shutil.copytree(engines.model, directory / "model")
    engine = Engine(
        directory / "model",
        directory / "split.log",
        bends=directory,
        # Two workers and what else runs here keep two cores busy: silence for 15 s is no sign.
        connector={"timeout_s": 60.0},
        in_process=False,
        tensor_parallel_size=2,
        **BENT,
    )
    try:
        engine.wait_until_ready()
        yield engine
    finally:
        engine.close()


def test_from_two_to_one(engines: Engines, split: Engine) -> None:
    prompts = random_prompts(*LENGTHS, seed=51)
    keep = [{"do_remote_decode": True}] * len(prompts)
    params = [answer["params"] for answer in split.generate(prompts, 1, keep)]
    assert [len(param["remote_peers"]) for param in params] == [2] * len(prompts)
    for consumer in ("d1", "d2"):
        before = engines.num_not_fetched(consumer)
        half = slice(0, 2) if consumer == "d1" else slice(2, 4)
        answers = engines[consumer].generate(prompts[half], 12, params[half])
        assert tokens_of(answers) == engines.right(prompts[half], 12)
        assert engines.num_not_fetched(consumer) == before


def test_from_one_to_two(engines: Engines, split: Engine, directory: Path) -> None:
    prompts, others = (random_prompts(*LENGTHS, seed=seed) for seed in (52, 53))
    answers = split.generate(prompts, 12, engines.prefill("p1", prompts))
    assert tokens_of(answers) == engines.right(prompts, 12)
    # It is the fetched bytes that the tokens above are of; with zeros all differ.
    (directory / "zero").touch()
    params = engines.prefill("p2", others)
    for prompt, param in zip(others, params, strict=True):
        told = split.generate([prompt], 12, [param])
        assert tokens_of(told) != engines.right([prompt], 12), len(prompt)
    (directory / "zero").unlink()
    assert "was not fetched" not in split.text()
