# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face cache on our blocks: ``generate`` uses it, and another process goes on with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import llm_datadist_torch as ld
from tests.test_demo import EXAMPLES, PROMPT, demo_environment

import transformers_cache as example  # isort: skip  (test_demo has made the examples importable)

pytestmark = pytest.mark.thorough


@pytest.fixture
def model() -> Iterator[example.PreTrainedModel]:
    threads = torch.get_num_threads()
    yield example.load(EXAMPLES / "model")
    torch.set_num_threads(threads)


@pytest.mark.whole_programs
def test_the_tokens_are_those_of_generate() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "transformers_cache.py"), "--tokens", "24"],
        env=demo_environment(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 tokens of 2 sequences pulled" in done.stdout
    assert "tokens equal to those of generate() alone" in done.stdout


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_with_our_cache(batch: int, model: example.PreTrainedModel) -> None:
    prompts = torch.tensor([list(PROMPT[7 * n :][:50]) for n in range(batch)])
    expected = example.generate(model, prompts, max_new_tokens=30)
    with ld.open() as node:
        free = list(range(example.NUM_BLOCKS))
        cache = example.BlocksCache(example.allocate(node, model), free, batch)
        got = example.generate(model, prompts, past_key_values=cache, max_new_tokens=30)
        assert torch.equal(got, expected)
        assert len(cache.blocks) == len(set(cache.blocks)) == batch * 5
        cache.release()
        assert sorted(free) == list(range(example.NUM_BLOCKS))


def test_wrong_bytes_are_noticed(model: example.PreTrainedModel) -> None:
    """What was handed over is what is used: other bytes give other tokens."""
    prompts = torch.tensor([list(PROMPT[:100])])
    with ld.open() as node:
        cache = example.BlocksCache(example.allocate(node, model), list(range(example.NUM_BLOCKS)))
        ids = example.generate(model, prompts, past_key_values=cache, max_new_tokens=1)
        for tensor in cache.kv.tensors:
            tensor[cache.blocks] = tensor[cache.blocks].flip(0)
        got = example.generate(model, ids, past_key_values=cache, max_new_tokens=30)
    assert not torch.equal(got, example.generate(model, prompts, max_new_tokens=31))


def test_too_few_blocks(model: example.PreTrainedModel) -> None:
    with ld.open() as node:
        cache = example.BlocksCache(example.allocate(node, model), [0, 1])
        with pytest.raises(RuntimeError, match="blocks needed, 2 are free"):
            cache.reserve(40)
        assert cache.blocks == []
