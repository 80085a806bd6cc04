# SPDX-License-Identifier: Apache-2.0
"""Which KV is served in which units, and what is refused."""

from __future__ import annotations

import pytest
import torch

from llm_datadist_torch import LLMParamError
from llm_datadist_torch.vllm.layouts import WHOLE_PAGE, Cut, describe
from tests.vllm_layouts.layout_cases import ASCEND, CPU, CPU_AMX, MLA, SPARSE_MLA, Worker


def described(kv_caches, arrangement="cpu/vec", block_size=32, heads=2, **options):
    options = {"tp_rank": 0, "tp_size": 1} | options
    return describe(
        kv_caches,
        block_size=block_size,
        total_kv_heads=heads,
        arrangement=arrangement,
        **options,
    )


@pytest.mark.parametrize(
    ("kind", "cuts", "units"),
    [
        (CPU, [Cut.K_TRANSPOSED], {(0, 0): 1, (0, 16): 32, (0, 32): 16}),
        (CPU_AMX, [Cut.OPAQUE], {(0, 0): 1}),
        (
            ASCEND,
            [Cut.TOKEN_MAJOR] * 2,
            {(0, 0): 1, (1, 0): 1, (0, 16): 2, (1, 16): 2, (0, 32): 1, (1, 32): 1},
        ),
        (
            MLA,
            [Cut.HEAD_MAJOR] * 2,
            {(0, 0): 1, (1, 0): 1, (0, 16): 2, (1, 16): 2, (0, 32): 1, (1, 32): 1},
        ),
        (
            SPARSE_MLA,
            [Cut.HEAD_MAJOR] * 3,
            {(p, t): n for t, n in ((0, 1), (16, 2), (32, 1)) for p in range(3)},
        ),
    ],
    ids=["cpu", "cpu amx", "ascend", "mla", "sparse mla"],
)
def test_groups(kind, cuts, units):
    worker = Worker(kind, 3, 32)
    layout = worker.layout
    assert [part.cut for part in layout.parts] == cuts
    assert [(g.part, g.tokens, g.units_per_block) for g in layout.groups] == [
        (*key, count) for key, count in units.items()
    ]
    for group, views in zip(layout.groups, worker.views, strict=True):
        assert len(views) == len(worker.tensors)
        for view, tensors in zip(views, worker.tensors, strict=True):
            tensor = tensors[group.part]
            assert view.data_ptr() == tensor.data_ptr()
            assert list(view.shape) == [3 * group.units_per_block, group.unit_bytes]
            assert view.numel() == tensor.numel() * tensor.itemsize


def test_layers_that_are_views_into_one_storage():
    """As vLLM's CPU backend has them: a layer stride and a block stride."""
    storage = torch.arange(2 * 3 * 2 * 32 * 8, dtype=torch.float32).view(2, 3, 2, 32, 8)
    layout, groups = described({"a": storage[0], "b": storage[1]})
    assert not layout.why_whole
    assert [view.data_ptr() for view in groups[0]] == [storage[0].data_ptr(), storage[1].data_ptr()]


def test_blocks_that_lie_apart_are_served_as_whole_pages():
    storage = torch.zeros(3, 2, 2, 32, 8)  # the layers of a block side by side
    layout, groups = described({"a": storage[:, 0], "b": storage[:, 1]})
    assert [group.tokens for group in layout.groups] == [WHOLE_PAGE]
    assert "lie apart" in layout.why_whole
    assert groups[0][1].stride() == (2 * 2 * 32 * 8 * 4, 1)


def test_quantised_kv_is_served_as_whole_pages():
    layout, _ = described({"a": torch.zeros(3, 2, 32, 8, dtype=torch.uint8)})
    assert "torch.uint8 inside a page is not known" in layout.why_whole


@pytest.mark.parametrize(
    ("total", "tp_size", "heads"),
    [(4, 1, [(0, 4)]), (4, 2, [(0, 2), (2, 4)]), (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)])],
)
def test_heads_of_ranks(total, tp_size, heads):
    layout, _ = described(
        {"a": torch.zeros(3, max(1, total // tp_size), 32, 8)}, heads=total, tp_size=tp_size
    )
    ranges = [layout.heads_of(rank, tp_size) for rank in range(tp_size)]
    assert [(r.start, r.stop) for r in ranges] == heads


PAIR = (torch.zeros(3, 32, 2, 4), torch.zeros(3, 32, 2, 4))


@pytest.mark.parametrize(
    ("kv_caches", "options", "reason"),
    [
        ({}, {}, "no KV caches"),
        ({"a": torch.zeros(3, 2, 32, 8)}, {"arrangement": "ROCM"}, "'ROCM' is none of which"),
        ({"a": torch.zeros(2, 3, 2, 32, 8)}, {}, "'a' can't be served: shape .* not 4 dimensions"),
        ({"a": torch.zeros(3, 2, 64, 8)}, {}, "is not \\[num_blocks, 2 heads, 32 tokens"),
        ({"a": torch.zeros(3, 32, 2, 8)}, {}, "is not \\[num_blocks, 2 heads, 32 tokens"),
        ({"a": PAIR}, {"block_size": 16}, "is not \\[num_blocks, 16 tokens, 2 heads"),
        ({"a": PAIR * 2}, {}, "it has 4 caches"),
        ({"a": ()}, {}, "it has 0 caches"),
        ({"a": (PAIR[0], PAIR[1][:2])}, {}, "different numbers of blocks"),
        ({"a": PAIR, "b": PAIR[:1]}, {}, "'b' .* not like the other layers"),
        ({"a": PAIR, "b": (PAIR[0], PAIR[1].half())}, {}, "'b' .* not like the other layers"),
        ({"a": torch.zeros(3, 32, 2, 8).transpose(1, 2)}, {}, "a page lies in pieces"),
        ({"a": torch.zeros(3, 1, 32, 8)}, {"heads": 3, "tp_size": 2}, "3 KV heads .* 2 workers"),
    ],
)
def test_refused(kv_caches, options, reason):
    with pytest.raises(LLMParamError, match=reason):
        described(kv_caches, **options)
