# SPDX-License-Identifier: Apache-2.0
"""Prefill in one engine of vllm-ascend, decode in another: the tokens of one that does both."""

from __future__ import annotations

import pytest

from tests.vllm.conftest import Engines, random_prompts, tokens_of

pytestmark = pytest.mark.timeout(1200)

LENGTHS = (33, 128, 129, 300)


def test_prompts_of_several_lengths(engines: Engines) -> None:
    """Those of more than 128 tokens are computed in chunks."""
    for length in LENGTHS:
        prompts = random_prompts(length, seed=length)
        answers = engines.hand_over("p", "d", prompts, 12)
        assert tokens_of(answers) == engines.right(prompts, 12, dtype=16), length
