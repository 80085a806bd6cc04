# SPDX-License-Identifier: Apache-2.0
"""Prefill in one engine of vllm-ascend, decode in another: the tokens of one that does both."""

from __future__ import annotations

import pytest

from tests.vllm.conftest import Engines, random_prompts, tokens_of

pytestmark = pytest.mark.timeout(1200)

LENGTHS = (33, 128, 129, 300)
TOKENS = 5
"""Of most answers. Few, because each takes Triton's interpreter long."""


def right(engines: Engines, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens of an engine that does all of it by itself."""
    return tokens_of(engines["whole16"].generate(prompts, TOKENS))


def test_prompts_of_several_lengths(engines: Engines) -> None:
    """Those of more than 128 tokens are computed in chunks."""
    for length in LENGTHS:
        prompts = random_prompts(length, seed=length)
        answers = engines.hand_over("p", "d", prompts, 12)
        assert tokens_of(answers) == engines.right(prompts, 12, dtype=16), length


def test_cached_prefixes(engines: Engines) -> None:
    """Both ends have the first block of the second prompt, and what follows is handed over."""
    (prefix,) = random_prompts(200, seed=2)
    prompts = [prefix + tail for tail in random_prompts(30, 100, seed=3)]
    for prompt, tokens in zip(prompts, right(engines, prompts), strict=True):
        answers = engines.hand_over("p", "d", [prompt], TOKENS)
        assert tokens_of(answers) == [tokens], len(prompt)


def test_other_weights_at_the_producer_make_every_output_differ(engines: Engines) -> None:
    """The comparison can fail: tokens depend on the bytes that are handed over."""
    prompts = random_prompts(*LENGTHS, seed=4)
    answers = engines.hand_over("other", "d", prompts, TOKENS)
    for prompt, tokens, own in zip(
        prompts, tokens_of(answers), right(engines, prompts), strict=True
    ):
        assert tokens != own, len(prompt)


def test_push(engines: Engines) -> None:
    for lengths in ((33,), (300, 129)):
        prompts = random_prompts(*lengths, seed=50 + lengths[0])
        wanted, sent = engines.push_params("push_d", len(prompts))
        engines["push_d"].begin(prompts, TOKENS, wanted)
        engines["push_p"].generate(prompts, 1, sent)
        assert tokens_of(engines["push_d"].finish()) == right(engines, prompts), lengths
    assert "was not pushed" not in engines["push_d"].text()


def test_a_killed_producer(engines: Engines) -> None:
    """What it had is computed again. The last test: nobody needs that producer any more."""
    prompts = random_prompts(129, 200, seed=60)
    params = engines.prefill("other", prompts)
    engines["other"].kill()
    before = engines.num_not_fetched("d")
    answers = engines["d"].generate(prompts, TOKENS, params)
    assert tokens_of(answers) == right(engines, prompts)
    assert engines.num_not_fetched("d") == before + len(prompts)
