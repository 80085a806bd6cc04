# SPDX-License-Identifier: Apache-2.0
"""Prefill in one engine, decode in another: the tokens of one that does both, every one."""

from __future__ import annotations

import pytest

from tests.service import eventually
from tests.vllm.conftest import Engines, random_prompts, tokens_of

pytestmark = pytest.mark.timeout(1200)

LENGTHS = (33, 64, 127, 128, 129, 300, 511, 900)


@pytest.mark.parametrize("consumer", ["d1", "d2"])
@pytest.mark.parametrize("producer", ["p1", "p2"])
def test_every_producer_and_every_consumer(engines: Engines, producer: str, consumer: str) -> None:
    for length in LENGTHS:
        prompts = random_prompts(length, seed=length)
        answers = engines.hand_over(producer, consumer, prompts, 12)
        assert tokens_of(answers) == engines.right(prompts, 12), length


def test_between_processes_in_bf16_as_a_plugin(engines: Engines) -> None:
    for length in LENGTHS:
        prompts = random_prompts(length, seed=length)
        answers = engines.hand_over("p16", "d16", prompts, 12)
        assert tokens_of(answers) == engines.right(prompts, 12, dtype=16), length


def test_batches_of_several_producers(engines: Engines) -> None:
    prompts = random_prompts(*LENGTHS, seed=1)
    params = [
        engines.prefill(("p1", "p2")[at % 2], [prompt])[0] for at, prompt in enumerate(prompts)
    ]
    answers = engines["d1"].generate(prompts, 20, params)
    assert tokens_of(answers) == engines.right(prompts, 20)


def test_both_consumers_at_once(engines: Engines) -> None:
    prompts = random_prompts(*LENGTHS[:6], seed=2)
    params = engines.prefill("p1", prompts)
    engines["d1"].begin(prompts[:3], 20, params[:3])
    engines["d2"].begin(prompts[3:], 20, params[3:])
    answers = engines["d1"].finish() + engines["d2"].finish()
    assert tokens_of(answers) == engines.right(prompts, 20)


def test_preempted_consumers(engines: Engines) -> None:
    before = engines["d2"].state()["preemptions"]
    prompts = random_prompts(*[370] * 8, seed=3)
    answers = engines.hand_over("p2", "d2", prompts, 100)
    assert engines["d2"].state()["preemptions"] > before
    assert tokens_of(answers) == engines.right(prompts, 100)


def test_engines_that_serve_and_pull(engines: Engines) -> None:
    prompts = random_prompts(200, 300, seed=4)
    of_d1, of_p2 = (engines.prefill(name, prompts) for name in ("d1", "p2"))
    engines["p2"].begin(prompts, 12, of_d1)
    engines["d1"].begin(prompts, 12, of_p2)
    for name in ("p2", "d1"):
        assert tokens_of(engines[name].finish()) == engines.right(prompts, 12)


def test_what_is_cached_is_not_pulled(engines: Engines) -> None:
    (prefix,) = random_prompts(300, seed=5)
    tails = random_prompts(100, 150, seed=6)
    prompts = [prefix + tail for tail in tails]
    for prompt, at_producer in zip((*prompts, prompts[0]), (0, 256, 384), strict=True):
        answers = engines.hand_over("p1", "d1", [prompt], 12)
        assert tokens_of(answers) == engines.right([prompt], 12)
        # vLLM has a consumer tell the client what the producer had cached, not what was pulled.
        assert answers[0]["cached"] == at_producer
    # All but the last token, whose block is full and was computed here, too.
    (prompt,) = random_prompts(256, seed=7)
    for _ in range(2):
        answers = engines.hand_over("p1", "d1", [prompt], 12)
        assert tokens_of(answers) == engines.right([prompt], 12)


@pytest.mark.parametrize(("producer", "consumer", "dtype"), [("p1", "d2", 32), ("p16", "d16", 16)])
def test_several_samples_of_one_prompt(
    engines: Engines, producer: str, consumer: str, dtype: int
) -> None:
    """In one process without prefix caching, and between processes with it.

    Not with chunked prefill: seeded sampling on the CPU ends vLLM's engine then.
    """
    sampling = {"n": 3, "seed": 5, "temperature": 1.0}
    prompts = random_prompts(300, seed=10)
    (right,) = engines[f"whole{dtype}"].generate(prompts, 8, **sampling)
    before = engines.num_not_fetched(consumer)
    params = engines.prefill(producer, prompts)
    (answer,) = engines[consumer].generate(prompts, 8, params, **sampling)
    assert answer["samples"] == right["samples"]
    assert len({tuple(sample) for sample in right["samples"]}) == 3, "they differ"
    assert engines.num_not_fetched(consumer) == before


def test_zeros_make_every_output_differ(engines: Engines) -> None:
    """The comparison can fail: tokens depend on the bytes that are handed over."""
    bend = engines.bends["d2"] / "zero"
    prompts = random_prompts(*LENGTHS, seed=8)
    bend.touch()
    try:
        for prompt in prompts:
            answers = engines.hand_over("p2", "d2", [prompt], 12)
            assert tokens_of(answers) != engines.right([prompt], 12)
    finally:
        bend.unlink()


def test_all_blocks_are_free_again(engines: Engines) -> None:
    prompts = random_prompts(200, 300, 400, seed=9)
    for producer, consumer in (("p1", "d1"), ("p2", "d2")):
        engines.hand_over(producer, consumer, prompts, 5)
    for name, blocks in (("p1", 256), ("p2", 256), ("d1", 256), ("d2", 26)):
        # One block is nobody's.
        assert eventually(lambda e=engines[name], n=blocks: e.state()["free_blocks"] == n - 1), name
