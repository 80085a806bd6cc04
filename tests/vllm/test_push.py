# SPDX-License-Identifier: Apache-2.0
"""The producer writes into the consumer's blocks while it computes the next layers."""

from __future__ import annotations

import itertools

import pytest

from tests.service import settle
from tests.vllm.conftest import Engines, random_prompts, tokens_of

pytestmark = pytest.mark.timeout(600)

_numbers = itertools.count()


def push(engines: Engines, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The consumer's tokens; it fails requests whose blocks don't come."""
    names = [f"transfer-{next(_numbers)}" for _ in prompts]
    peers = [[77, "127.0.0.1", engines.push_port]]
    engines["push_d"].begin(
        prompts,
        max_tokens,
        [{"do_remote_prefill": True, "transfer_id": name} for name in names],
    )
    engines["push_p"].generate(
        prompts,
        1,
        [{"do_remote_decode": True, "transfer_id": name, "remote_peers": peers} for name in names],
    )
    return tokens_of(engines["push_d"].finish())


def test_prompts_of_many_lengths(engines: Engines) -> None:
    for length in (33, 128, 129, 300, 900):
        prompts = random_prompts(length, seed=40 + length)
        assert push(engines, prompts, 12) == engines.right(prompts, 12), length


def test_a_batch_with_cached_prefixes(engines: Engines) -> None:
    (prefix,) = random_prompts(400, seed=41)
    prompts = [prefix + tail for tail in random_prompts(30, 100, 300, seed=42)]
    for _ in range(2):
        assert push(engines, prompts, 12) == engines.right(prompts, 12)
    for name in ("push_p", "push_d"):
        assert settle(lambda e=engines[name]: e.state()["free_blocks"] == 255), name
