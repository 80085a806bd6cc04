# SPDX-License-Identifier: Apache-2.0
"""The demo: paged generation is right by itself, across processes, and it notices damage."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import llm_datadist_torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import paged_model as pm  # noqa: E402  (found through the line above)
import pd_fleet  # noqa: E402

PROMPT = (EXAMPLES / "prompt.txt").read_bytes().removesuffix(b"\n")
TOKENS = 48


@pytest.fixture(scope="module")
def model() -> Iterator[pm.LlamaForCausalLM]:
    threads = torch.get_num_threads()
    yield pm.load_model()
    torch.set_num_threads(threads)


def new_tensors(model: pm.LlamaForCausalLM, num_blocks: int = 80) -> list[torch.Tensor]:
    """Cache tensors full of NaN: reading what nobody has written would show."""
    shape = pm.cache_shape(model.config, num_blocks)
    return [torch.full(shape, torch.nan) for _ in range(pm.num_tensors(model.config))]


def shuffled(num_blocks: int = 80, seed: int = 7) -> pm.BlockAllocator:
    order = list(range(num_blocks))
    random.Random(seed).shuffle(order)
    return pm.BlockAllocator(order)


def demo_command(*arguments: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / "pd_generate.py"), *arguments]


def demo_environment() -> dict[str, str]:
    """The demo gets the package that the tests have, installed or not."""
    package = str(Path(llm_datadist_torch.__file__).resolve().parents[1])
    # What is there already may be the simulator's.
    paths = [package, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        demo_command(*arguments),
        env=demo_environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


class TestShippedModel:
    def test_weights_are_small(self) -> None:
        assert (EXAMPLES / "model" / "model.safetensors").stat().st_size <= 4_000_000

    def test_it_has_learned_english(self, model: pm.LlamaForCausalLM) -> None:
        """An untrained model needs 8 bits per byte, English letters alone about 4.5."""
        prompt = torch.tensor([list(PROMPT)])
        with torch.inference_mode():
            nats = model(prompt, labels=prompt).loss.item()
        assert nats / 0.6931 < 3.0


class TestPagedCache:
    @pytest.mark.parametrize(
        "prompt",
        [PROMPT[:n] for n in (1, 15, 16, 17, 64, 300)] + [PROMPT, b"class Queue:\n    \xff\x00"],
        ids=lambda prompt: f"{len(prompt)}B",
    )
    def test_tokens_equal_generate(self, model: pm.LlamaForCausalLM, prompt: bytes) -> None:
        cache = pm.PagedCache(new_tensors(model), shuffled())
        tokens = pm.generate(model, cache, list(prompt), TOKENS)
        ids = torch.tensor([list(prompt)])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS
        )
        assert tokens == expected[0, len(prompt) :].tolist()
        assert len(cache.blocks) == -(-(len(prompt) + TOKENS - 1) // pm.BLOCK_SIZE)

    def test_two_sequences_share_a_cache(self, model: pm.LlamaForCausalLM) -> None:
        """Token by token in turn, each as if it were alone."""
        prompts = [list(PROMPT[:100]), list(PROMPT[200:333])]
        expected = [
            pm.generate(model, pm.PagedCache(new_tensors(model), shuffled()), prompt, TOKENS)
            for prompt in prompts
        ]
        tensors, allocator = new_tensors(model), shuffled()
        caches = [pm.PagedCache(tensors, allocator) for _ in prompts]
        firsts = [
            pm.prefill(model, cache, prompt) for cache, prompt in zip(caches, prompts, strict=True)
        ]
        rest = zip(
            *(
                pm.decode(model, cache, first, TOKENS - 1)
                for cache, first in zip(caches, firsts, strict=True)
            ),
            strict=True,
        )
        together = [
            [first, *more] for first, more in zip(firsts, zip(*rest, strict=True), strict=True)
        ]
        assert together == expected
        assert not set(caches[0].blocks) & set(caches[1].blocks)

    def test_out_of_blocks_changes_nothing(self) -> None:
        allocator = pm.BlockAllocator([5, 3, 9])
        assert allocator.take(1) == [5]
        with pytest.raises(pm.OutOfBlocksError, match="3 blocks asked for, 2 free"):
            allocator.take(3)
        assert allocator.take(2) == [3, 9]

    def test_release_gives_the_blocks_back(self, model: pm.LlamaForCausalLM) -> None:
        allocator = shuffled()
        cache = pm.PagedCache(new_tensors(model), allocator, length=33)
        assert allocator.num_free == 77
        cache.release()
        assert allocator.num_free == 80


class TestHandOver:
    """Prefill in one cache, the blocks copied to other places in a second, decode there."""

    @pytest.fixture
    def alone(self, model: pm.LlamaForCausalLM) -> list[int]:
        return pm.generate(
            model, pm.PagedCache(new_tensors(model), shuffled()), list(PROMPT), TOKENS
        )

    def hand_over(self, model: pm.LlamaForCausalLM, damage: str = "") -> tuple[list[int], bool]:
        """Returns the tokens, and whether both sides have the same keys and values."""
        source = new_tensors(model)
        prefilled = pm.PagedCache(source, pm.BlockAllocator(range(80)))
        first = pm.prefill(model, prefilled, list(PROMPT))
        target = new_tensors(model)
        pulled = pm.PagedCache(target, shuffled(), length=len(PROMPT))
        src, dst = list(prefilled.blocks), list(pulled.blocks)
        assert src != dst
        if damage == "swapped":
            src[2], src[3] = src[3], src[2]
        for to, tensor in zip(target, source, strict=True):
            to[dst] = 0.0 if damage == "zeroed" else tensor[src]
        equal = pulled.digest() == prefilled.digest()
        return [first, *pm.decode(model, pulled, first, TOKENS - 1)], equal

    def test_undamaged(self, model: pm.LlamaForCausalLM, alone: list[int]) -> None:
        assert self.hand_over(model) == (alone, True)

    def test_zeroed_blocks_change_the_tokens(
        self, model: pm.LlamaForCausalLM, alone: list[int]
    ) -> None:
        tokens, equal = self.hand_over(model, "zeroed")
        assert tokens != alone
        assert not equal

    def test_swapped_blocks_change_the_digest(self, model: pm.LlamaForCausalLM) -> None:
        """Not the tokens: keys carry their positions, and attention is a sum over all of them."""
        _, equal = self.hand_over(model, "swapped")
        assert not equal


class TestFleet:
    """What the waits do when a process is gone or silent; the processes are still importing."""

    def test_killed_process_ends_the_wait(self) -> None:
        with pd_fleet.Fleet(1, 1, pd_fleet.Settings()) as fleet:
            os.kill(fleet._processes["decode 0"].pid, signal.SIGKILL)
            with pytest.raises(pd_fleet.ChildFailedError, match="decode 0 died with exit code -9"):
                fleet.collect("ready", 2)
        assert not any(process.is_alive() for process in fleet._processes.values())

    def test_silence_ends_the_wait(self) -> None:
        with (
            pd_fleet.Fleet(1, 0, pd_fleet.Settings(timeout_s=0.5)) as fleet,
            pytest.raises(pd_fleet.ChildFailedError, match=r"not done after 0\.5 s"),
        ):
            fleet.collect("linked", 1)
        assert not any(process.is_alive() for process in fleet._processes.values())


@pytest.mark.whole_programs
class TestProgram:
    @pytest.mark.parametrize(
        "size",
        [
            pytest.param(("1", "1"), id="1x1"),
            pytest.param(
                ("2", "2"),
                id="2x2",
                marks=[pytest.mark.thorough, pytest.mark.same_on_every_device],
            ),
        ],
    )
    def test_tokens_equal(self, size: tuple[str, str]) -> None:
        result = run_demo("--prefill", size[0], "--decode", size[1], "--tokens", str(TOKENS))
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"tokens equal: {size[0]} of {size[0]}" in result.stdout
        assert f"bytes equal: {size[0]} of {size[0]}" in result.stdout
        assert result.stdout.count("  stopped") == 2 * int(size[0])

    @pytest.mark.thorough
    @pytest.mark.same_on_every_device
    def test_zeroed_blocks_are_noticed(self) -> None:
        result = run_demo("--damage", "--tokens", str(TOKENS))
        assert result.returncode == 1, result.stdout + result.stderr
        assert "TOKENS DIFFER: 0 of 1" in result.stdout
        assert "BYTES DIFFER: 0 of 1" in result.stdout

    @pytest.mark.thorough
    @pytest.mark.same_on_every_device
    def test_failure_of_a_process_ends_the_demo(self) -> None:
        """The prompt fits into so many blocks and the text doesn't, so decoding fails."""
        blocks = -(-len(PROMPT) // pm.BLOCK_SIZE) + 1
        result = run_demo("--blocks", str(blocks), "--tokens", str(TOKENS))
        assert result.returncode == 1
        assert "decode 0 failed" in result.stderr
        assert "OutOfBlocksError: 1 blocks asked for, 0 free" in result.stderr
        assert "Traceback" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["/no/such/file"], "No such file"),
            (["--prefill", "0"], "'0' is not a number from 1 on"),
            (["--tokens", "513"], "512 at most"),
        ],
    )
    def test_bad_command_line(
        self, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import pd_generate

        try:
            code: object = pd_generate.main(arguments)
        except SystemExit as exit_:  # that is how argparse ends
            code = exit_.code
        assert code == 2
        assert text in capsys.readouterr().err
