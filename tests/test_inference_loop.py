# SPDX-License-Identifier: Apache-2.0
"""The inference loop: its outputs are plain generation's, its memory moves, and damage shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_datadist_torch import Cache, CacheManager, LLMDataDist, Placement
from tests.test_demo import EXAMPLES, demo_environment

import inference_loop as loop  # isort: skip  (test_demo has made the examples importable)
import paged_model as pm  # isort: skip
import shared_blocks  # isort: skip

SMALL = ["--requests", "3", "--tokens", "48", "--blocks", "20"]


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def counters(text: str) -> dict[str, int]:
    return {name: int(n) for name, n in re.findall(r"^([a-z ]+[a-z]) +(\d+)$", text, re.MULTILINE)}


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "inference_loop.py"), *arguments],
        env=demo_environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            [],
            id="default",
            marks=[pytest.mark.thorough, pytest.mark.same_on_every_device],
        ),
        pytest.param(SMALL, id="small"),
    ],
)
@pytest.mark.whole_programs
def test_outputs_equal_plain_generation(arguments: list[str]) -> None:
    done = run_program(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    sequences = 5 if arguments else 11
    assert f"equal to plain generation's: {sequences} of {sequences}\n" in done.stdout
    assert "DIFFERENT" not in done.stdout
    counts = counters(done.stdout)
    # Each of these really happened, and nothing is left.
    assert counts["preemptions"] >= 1
    assert counts["blocks swapped in"] == counts["blocks swapped out"] >= 10
    assert counts["blocks swapped in elsewhere"] >= counts["blocks swapped in"] // 2 >= 1
    assert counts["prefix blocks shared"] >= 10
    assert counts["forks"] == sequences - (3 if arguments else 7)
    assert counts["blocks copied on write"] >= 1
    assert counts["most running"] >= 3
    assert counts["blocks still held"] == 0


@pytest.mark.parametrize("arguments", [["--blocks", "9"], ["--tokens", "513"], ["--running", "2"]])
def test_what_can_not_run_is_refused(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        loop.main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err
    assert LLMDataDist.llm_engine_instance is None


@pytest.mark.whole_programs
def test_help_says_what_it_shows() -> None:
    done = run_program("--help")
    assert done.returncode == 0
    for word in ("--blocks", "Preemption", "swap_blocks", "copy_blocks", "model.generate"):
        assert word in done.stdout


def test_keys_and_values_come_back_byte_for_byte(monkeypatch: Any, capsys: Any) -> None:
    """Tokens alone would not show blocks in the wrong order: attention is a sum over all."""
    out: dict[Any, tuple[str, list[int]]] = {}
    back: list[tuple[Any, list[int]]] = []
    compared = 0
    preempt, resume, move = loop.Engine.preempt, loop.Engine.resume, loop.Engine.move

    def preempting(self: loop.Engine, victim: loop.Running) -> None:
        out[victim] = victim.kv.digest(), victim.kv.blocks
        preempt(self, victim)

    def resuming(self: loop.Engine, sequence: loop.Running) -> None:
        resume(self, sequence)
        back.append((sequence, sequence.kv.blocks))

    def moving(self: loop.Engine) -> None:
        nonlocal compared
        move(self)
        for sequence, blocks in back:
            digest, before = out[sequence]
            assert sequence.kv.digest() == digest
            assert blocks != before
            compared += 1
        back.clear()

    monkeypatch.setattr(loop.Engine, "preempt", preempting)
    monkeypatch.setattr(loop.Engine, "resume", resuming)
    monkeypatch.setattr(loop.Engine, "move", moving)
    assert loop.main(SMALL) == 0
    assert compared == counters(capsys.readouterr().out)["preemptions"] > 0


def test_one_damaged_block_is_noticed(monkeypatch: Any, capsys: Any) -> None:
    """Noise in the first block that is swapped in."""
    swap = CacheManager.swap_blocks
    damaged = []

    def damaging(
        self: CacheManager, src: Cache, dst: Cache, pairs: torch.Tensor, **options: bool
    ) -> None:
        swap(self, src, dst, pairs, **options)
        if dst.cache_desc.placement == Placement.DEVICE and not damaged:
            damaged.append(int(pairs[0, 1]))
            for tensor in dst.block(damaged[0]):
                tensor.copy_(torch.randn(tensor.shape) * 10)

    monkeypatch.setattr(CacheManager, "swap_blocks", damaging)
    assert loop.main(SMALL) == 1
    assert len(damaged) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_a_missing_copy_is_noticed(monkeypatch: Any, capsys: Any) -> None:
    """Without copy on write, forks continue on blocks that hold something else."""
    monkeypatch.setattr(CacheManager, "copy_blocks", lambda *_, **__: None)
    assert loop.main(SMALL) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_pool_counts_references_and_finds_what_is_left() -> None:
    pool = shared_blocks.BlockPool(4)
    assert pool.take(3) == [0, 1, 2]
    pool.publish(b"a", 0)
    pool.publish(b"b", 1)
    pool.publish(b"a", 2)  # known already: nobody is led there
    assert pool.find([b"a", b"b", b"c"]) == [0, 1]
    assert pool.find([b"c", b"a"]) == []
    pool.share([0])
    pool.give_back([0, 1, 2])
    assert (pool.num_free, pool.references[0]) == (3, 1)
    pool.share(pool.find([b"a", b"b"]))  # 1 was unused, and still knows its tokens
    assert (pool.num_free, pool.references[0], pool.references[1]) == (2, 2, 1)
    with pytest.raises(pm.OutOfBlocksError, match="3 blocks asked for, 2 free"):
        pool.take(3)
    pool.give_back([1])
    assert pool.take(3) == [3, 2, 1]
    assert pool.find([b"b"]) == []  # 1 will hold something else


def test_hashes_stand_for_all_tokens_before() -> None:
    size = pm.BLOCK_SIZE
    tokens = list(range(3 * size - 1))
    hashes = shared_blocks.block_hashes(tokens)
    assert len(hashes) == 2
    assert shared_blocks.block_hashes([99, *tokens[1:]])[1] != hashes[1]
    assert shared_blocks.block_hashes(tokens[:size]) == hashes[:1]
