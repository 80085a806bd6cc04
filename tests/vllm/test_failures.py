# SPDX-License-Identifier: Apache-2.0
"""Engines that die, differ, or come too late: right tokens or a clean error, and nothing hangs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.service import eventually
from tests.vllm.conftest import Engines, random_prompts, tokens_of

pytestmark = pytest.mark.timeout(1200)

CONSUMERS = ("d1", "d2")
"""One that computes what it could not load, and one that fails such requests."""


def hold_back(bend: Path) -> None:
    (bend / "hold").touch()


def is_held(bend: Path) -> bool:
    return (bend / "held").exists()


def release(bend: Path) -> None:
    (bend / "hold").unlink()
    (bend / "held").unlink()


def test_the_prompt_of_somebody_else(engines: Engines) -> None:
    prompt, other = random_prompts(200, 200, seed=20)
    params = engines.prefill("p1", [other])
    answers = engines["d2"].generate([prompt], 12, params)
    assert tokens_of(answers) == engines.right([prompt], 12)


def test_params_that_are_broken(engines: Engines) -> None:
    (prompt,) = random_prompts(200, seed=21)
    answers = engines["d2"].generate([prompt], 12, [{"do_remote_prefill": True}])
    assert tokens_of(answers) == engines.right([prompt], 12)


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_an_engine_of_another_kind(engines: Engines, consumer: str) -> None:
    (prompt,) = random_prompts(200, seed=22)
    params = engines.prefill("p16", [prompt])
    (answer,) = engines[consumer].generate([prompt], 12, params)
    assert "dtype is 'torch.float32' here and 'torch.bfloat16' there" in engines[consumer].text()
    if consumer == "d1":
        assert answer["tokens"] == engines.right([prompt], 12)[0]
    else:
        assert (answer["finish_reason"], answer["tokens"]) == ("error", [])


def test_a_consumer_that_comes_too_late(engines: Engines) -> None:
    prompts = random_prompts(200, 300, seed=23)
    all_blocks = engines["victim1"].state()["free_blocks"]
    params = engines.prefill("victim1", prompts)
    assert eventually(lambda: engines["victim1"].state()["free_blocks"] == all_blocks)
    answers = engines["d1"].generate(prompts, 12, params)
    assert tokens_of(answers) == engines.right(prompts, 12)
    assert re.search("has given up the blocks|have been given up", engines["d1"].text())


def test_killed_between_prefill_and_pull_and_as_a_consumer(engines: Engines) -> None:
    prompts = random_prompts(200, 500, 600, seed=24)
    params = engines.prefill("victim1", prompts[:2])
    bend = engines.bends["victim1"]
    before = engines["p1"].state()["free_blocks"]
    hold_back(bend)
    engines["victim1"].begin(prompts[2:], 12, engines.prefill("p1", prompts[2:]))
    assert eventually(lambda: is_held(bend))
    assert engines["p1"].state()["free_blocks"] < before
    engines["victim1"].kill()
    assert eventually(lambda: engines["p1"].state()["free_blocks"] == before), "nobody reads them"
    check_both_policies(engines, prompts, params)


def test_killed_in_the_middle_of_a_pull(engines: Engines) -> None:
    prompts = random_prompts(500, 600, seed=25)
    params = engines.prefill("victim2", prompts)
    bends = [engines.bends[name] for name in CONSUMERS]
    for bend in bends:
        hold_back(bend)
    check_both_policies(engines, prompts, params, bends)


def check_both_policies(
    engines: Engines,
    prompts: list[list[int]],
    params: list[dict[str, Any]],
    bends: Sequence[Path] = (),
) -> None:
    """The producer is dead, or is killed as soon as both consumers pull."""
    for at, name in enumerate(CONSUMERS):
        engines[name].begin([prompts[at]], 12, [params[at]])
    if bends:
        assert eventually(lambda: all(map(is_held, bends)))
        engines["victim2"].kill()
        for bend in bends:
            release(bend)
    assert tokens_of(engines["d1"].finish()) == engines.right(prompts[:1], 12)
    (answer,) = engines["d2"].finish()
    assert (answer["finish_reason"], answer["tokens"]) == ("error", [])
    for name in CONSUMERS:
        again = engines.hand_over("p2", name, prompts[:2], 12)
        assert tokens_of(again) == engines.right(prompts[:2], 12)
