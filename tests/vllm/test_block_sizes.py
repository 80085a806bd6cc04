# SPDX-License-Identifier: Apache-2.0
"""Blocks of 128 tokens at one end, of 256 at the other: both ways, and with cached prefixes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.conftest import BENT, Engines, random_prompts, tokens_of
from tests.vllm.engines import Engine

pytestmark = pytest.mark.timeout(1200)

LENGTHS = (33, 128, 129, 256, 257, 511, 900)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wide")


@pytest.fixture(scope="module")
def wide(engines: Engines, directory: Path) -> Iterator[Engine]:
    """An engine with blocks of 256 tokens, that serves and pulls."""
    # The weights are compared, not where they are.
    shutil.copytree(engines.model, directory / "model")
    log = directory / "wide.log"
    engine = Engine(directory / "model", log, bends=directory, connector={}, block_size=256, **BENT)
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
    assert "was not fetched" not in wide.text()


def test_from_256_to_128(engines: Engines, wide: Engine) -> None:
    """The consumer compares checksums, too."""
    prompts = random_prompts(*LENGTHS, seed=32)
    params = [answer["params"] for answer in wide.generate(prompts, 1, keep(len(prompts)))]
    before = engines["d1"].text().count("was not fetched")
    answers = engines["d1"].generate(prompts, 12, params)
    assert tokens_of(answers) == engines.right(prompts, 12)
    assert engines["d1"].text().count("was not fetched") == before


def test_zeros_make_every_output_differ(engines: Engines, wide: Engine, directory: Path) -> None:
    """It is the fetched bytes that the tokens above are of."""
    prompts, others = (random_prompts(*LENGTHS, seed=seed) for seed in (33, 34))
    of_wide = [answer["params"] for answer in wide.generate(prompts, 1, keep(len(prompts)))]
    of_p1 = engines.prefill("p1", others)
    bends = [directory / "zero", engines.bends["d2"] / "zero"]
    for bend in bends:
        bend.touch()
    try:
        # One by one: zeros are left in the prefix cache.
        for name, asked, params in ((None, others, of_p1), ("d2", prompts, of_wide)):
            consumer = engines[name] if name else wide
            for prompt, param in zip(asked, params, strict=True):
                told = consumer.generate([prompt], 12, [param])
                assert tokens_of(told) != engines.right([prompt], 12), (name, len(prompt))
    finally:
        for bend in bends:
            bend.unlink()


def test_only_what_is_not_cached_is_moved(engines: Engines, wide: Engine) -> None:
    (prefix,) = random_prompts(600, seed=35)
    for tail in random_prompts(40, 300, seed=36):
        prompts = [prefix + tail]
        answers = wide.generate(prompts, 12, engines.prefill("p2", prompts))
        assert tokens_of(answers) == engines.right(prompts, 12)
    assert "was not fetched" not in wide.text()
