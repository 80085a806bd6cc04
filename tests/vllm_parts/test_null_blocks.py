# SPDX-License-Identifier: Apache-2.0
"""vLLM's block 0 is nobody's: it is never moved, and never said to have failed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llm_datadist_torch.vllm.layouts import Kind
from tests.vllm_parts.workers import Worker, group, snapshot


@pytest.mark.parametrize(
    ("there", "here", "moved"),
    [
        ([0, 0, 0, 7], [0, 0, 0, 7], {7: 7}),
        ([1, 2, 3, 7], [0, 0, 0, 7], {7: 7}),
        ([0, 0, 0, 7], [4, 5, 6, 7], {7: 7}),
        ([0, 0, 1, 7], [0, 2, 3, 4], {3: 1, 4: 7}),
    ],
)
def test_only_pairs_of_real_blocks_are_moved(
    worker: Callable[..., Worker], there: list[int], here: list[int], moved: dict[int, int]
) -> None:
    p, d = worker(8, 1), worker(8, 2)
    expected = snapshot(d)
    assert not d.pull(p.grant(there, 128), here, 0, 128)
    for name, tensor in expected.items():
        for mine, theirs in moved.items():
            tensor[mine] = p.kv[name][theirs]
        assert torch.equal(d.kv[name], tensor)


def test_a_null_block_is_never_said_to_have_failed(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(8, 2)
    remote = p.grant([0, 7], 64)
    p.half.leases.end_all("the test has it so")
    assert d.pull(remote, [0, 5], 0, 64) == {5}


def test_what_a_window_needs_must_have_been_kept(worker: Callable[..., Worker]) -> None:
    """128 tokens: a window of 40 looks back at tokens 89 and on, which begin in the third block."""
    groups = [group("a", "b", "c", kind=Kind.WINDOW, window=40)]
    p, d = worker(8, 1, groups=groups), worker(8, 2, groups=groups)
    assert not d.pull(p.grant([0, 0, 3, 7], 128), [0, 2, 3, 4], 0, 128)
    assert d.pull(p.grant([0, 0, 0, 7], 128), [0, 2, 3, 4], 0, 128) == {2, 3, 4}
