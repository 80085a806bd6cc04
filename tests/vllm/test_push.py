# SPDX-License-Identifier: Apache-2.0
"""The producer writes into the consumer's blocks while it computes the next layers."""

from __future__ import annotations

import signal

import pytest

from tests.service import eventually
from tests.vllm.conftest import Engines, random_prompts, tokens_of

pytestmark = pytest.mark.timeout(1200)

CONSUMERS = ("push_d", "push_d2")
"""One that fails requests whose blocks don't come, and one that computes them."""


def push(
    engines: Engines, prompts: list[list[int]], max_tokens: int, consumer: str = "push_d"
) -> list[list[int]]:
    """The consumer's tokens, of blocks that have come."""
    before = num_not_pushed(engines, consumer)
    wanted, sent = engines.push_params(consumer, len(prompts))
    engines[consumer].begin(prompts, max_tokens, wanted)
    engines["push_p"].generate(prompts, 1, sent)
    tokens = tokens_of(engines[consumer].finish())
    assert num_not_pushed(engines, consumer) == before
    return tokens


def num_not_pushed(engines: Engines, consumer: str) -> int:
    return engines[consumer].text().count("was not pushed")


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
        assert eventually(lambda e=engines[name]: e.state()["free_blocks"] == 255), name


def test_several_samples_of_one_prompt(engines: Engines) -> None:
    prompts = random_prompts(300, seed=43)
    sampling = {"n": 3, "seed": 5, "temperature": 1.0}
    (right,) = engines["whole32"].generate(prompts, 8, **sampling)
    for consumer in CONSUMERS:
        wanted, sent = engines.push_params(consumer, 1)
        engines[consumer].begin(prompts, 8, wanted, **sampling)
        engines["push_p"].generate(prompts, 1, sent)
        (answer,) = engines[consumer].finish()
        assert answer["samples"] == right["samples"], consumer


def test_a_request_that_is_aborted_before_its_first_layer(engines: Engines) -> None:
    """The consumer does not wait for ``lease_s``: its log says why."""
    prompts = random_prompts(300, seed=44)
    for consumer in CONSUMERS:
        wanted, sent = engines.push_params(consumer, 1)
        engines[consumer].begin(prompts, 12, wanted)
        engines["push_p"].abort_at_once(prompts[0], sent[0])
        (answer,) = engines[consumer].finish()
        if consumer == "push_d2":
            assert answer["tokens"] == engines.right(prompts, 12)[0]
        else:
            assert (answer["finish_reason"], answer["tokens"]) == ("error", [])
        assert f"transfer {wanted[0]['transfer_id']} did not come" not in engines[consumer].text()


def test_sigkill_before_and_in_the_middle(engines: Engines) -> None:
    bends = engines.bends["push_victim"]
    prompts = random_prompts(300, 400, 500, 600, seed=45)
    sent, names = [], []
    for at, consumer in enumerate(CONSUMERS):
        wanted, of_producer = engines.push_params(consumer, 2)
        names += [each["transfer_id"] for each in wanted]
        sent += of_producer
        engines[consumer].begin(prompts[2 * at : 2 * at + 2], 12, wanted)
    for name, when in zip(names, ("before", "middle") * 2, strict=True):
        (bends / f"{when}-{name}").touch()
    engines["push_victim"].begin(prompts, 1, sent)
    assert eventually(lambda: all((bends / f"held-{name}").exists() for name in names))
    engines["push_victim"].signal(signal.SIGKILL)
    for answer in engines["push_d"].finish():
        assert (answer["finish_reason"], answer["tokens"]) == ("error", [])
    assert tokens_of(engines["push_d2"].finish()) == engines.right(prompts[2:], 12)
    for consumer in CONSUMERS:
        again = random_prompts(300, 400, seed=46)
        assert push(engines, again, 12, consumer) == engines.right(again, 12), consumer
        assert eventually(lambda e=engines[consumer]: e.state()["free_blocks"] == 255), consumer
