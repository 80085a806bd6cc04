# SPDX-License-Identifier: Apache-2.0
"""Which KV is served in which units, and what is refused."""

from __future__ import annotations

import pytest
import torch

from llm_datadist_torch import LLMParamError
from llm_datadist_torch.vllm.layouts import (
    WHOLE_PAGE,
    Cut,
    GroupLayout,
    GroupSpec,
    Kind,
    describe,
    heads_of,
)
from tests.vllm_layouts.layout_cases import ASCEND, CPU, CPU_AMX, MLA, SPARSE_MLA, Worker


def described(kv_caches, arrangement="cpu/vec", block_size=32, heads=2, **options):
    layers = tuple(kv_caches)
    group = GroupSpec(GroupLayout(Kind.ATTENTION, block_size), layers, dict.fromkeys(layers, heads))
    return describe(kv_caches, [group], arrangement=arrangement, **options)


@pytest.mark.parametrize(
    ("kind", "cuts", "units"),
    [
        (CPU, [Cut.K_TRANSPOSED], {(0, 0): 1, (0, 16): 32, (0, 32): 16}),
        (CPU_AMX, [Cut.OPAQUE], {(0, 0): 1}),
        (
            ASCEND,
            [Cut.TOKEN_MAJOR] * 2,
            {(p, 0): 1 for p in range(2)}
            | {(p, t): n for p in range(2) for t, n in ((1, 128), (16, 2), (32, 1))},
        ),
        (
            MLA,
            [Cut.HEAD_MAJOR] * 2,
            {(p, 0): 1 for p in range(2)}
            | {(p, t): n for p in range(2) for t, n in ((1, 32), (16, 2), (32, 1))},
        ),
        (
            SPARSE_MLA,
            [Cut.HEAD_MAJOR] * 3,
            {(p, 0): 1 for p in range(3)}
            | {(p, t): n for p in range(3) for t, n in ((1, 32), (16, 2), (32, 1))},
        ),
    ],
    ids=["cpu", "cpu amx", "ascend", "mla", "sparse mla"],
)
def test_caches(kind, cuts, units):
    worker = Worker(kind, 3, 32)
    layout = worker.layout
    assert [part.cut for part in layout.parts] == cuts
    assert [(c.part, c.tokens, c.units_per_page) for c in layout.caches] == [
        (*key, count) for key, count in units.items()
    ]
    for cache, views in zip(layout.caches, worker.views, strict=True):
        assert len(views) == len(worker.tensors)
        for view, tensors in zip(views, worker.tensors, strict=True):
            tensor = tensors[cache.part]
            assert view.data_ptr() == tensor.data_ptr()
            assert list(view.shape) == [3 * cache.units_per_page, cache.unit_bytes]
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
    assert [cache.tokens for cache in layout.caches] == [WHOLE_PAGE]
    assert "lie apart" in layout.why_whole
    assert groups[0][1].stride() == (2 * 2 * 32 * 8 * 4, 1)


def test_quantised_kv_is_served_as_whole_pages():
    layout, _ = described({"a": torch.zeros(3, 2, 32, 8, dtype=torch.uint8)})
    assert "arranges torch.uint8 [3, 2, 32, 8] inside a page is not known" in layout.why_whole


@pytest.mark.parametrize(
    ("total", "tp_size", "heads"),
    [(4, 1, [(0, 4)]), (4, 2, [(0, 2), (2, 4)]), (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)])],
)
def test_heads_of_ranks(total, tp_size, heads):
    ranges = [heads_of(total, rank, tp_size) for rank in range(tp_size)]
    assert [(r.start, r.stop) for r in ranges] == heads


PAIR = (torch.zeros(3, 32, 2, 4), torch.zeros(3, 32, 2, 4))


@pytest.mark.parametrize(
    ("kv_caches", "options", "reason"),
    [
        ({}, {}, "no KV caches"),
        ({"a": PAIR + PAIR + PAIR[:1]}, {}, "it has 5 tensors"),
        ({"a": ()}, {}, "it has 0 tensors"),
        ({"a": (PAIR[0], PAIR[1][:2])}, {}, "dimension 0 is not 3 blocks"),
        ({"a": torch.zeros(3, 5, 2, 32, 8)}, {}, "neither K and V, nor blocks"),
        ({"a": PAIR}, {"num_blocks": 2}, "dimension 0 is not 2 blocks"),
        ({"a": torch.zeros(9, 2, 32, 8)}, {"num_blocks": 3}, "32 tokens can't be shared by 3"),
        ({"a": torch.zeros(3, 64, 2, 8)[:, :32, :, ::2]}, {}, "a page lies in pieces"),
        ({"a": torch.zeros(3, 1, 32, 8)}, {"heads": 3, "tp_size": 2}, "3 KV heads .* 2 workers"),
    ],
)
def test_refused(kv_caches, options, reason):
    with pytest.raises(LLMParamError, match=reason):
        described(kv_caches, **options)


@pytest.mark.parametrize(
    ("tensor", "arrangement"),
    [
        (torch.zeros(3, 2, 32, 8), "ROCM"),
        (torch.zeros(3, 2, 64, 8), "cpu/vec"),
        (torch.zeros(3, 5, 7), "ascend"),
    ],
)
def test_pages_that_are_not_known_inside_are_whole(tensor, arrangement):
    layout, _ = described({"a": tensor}, arrangement=arrangement)
    assert [part.cut for part in layout.parts] == [Cut.OPAQUE]
    assert "is not known" in layout.why_whole


def test_layers_that_share_a_tensor_are_served_once():
    first, other = torch.zeros(3, 2, 32, 8), torch.zeros(3, 2, 32, 8)
    layout, caches = described({"a": first, "b": other, "c": first, "d": other})
    assert layout.parts[0].layers == ("a", "b")
    assert [view.data_ptr() for view in caches[0]] == [first.data_ptr(), other.data_ptr()]


def test_layers_that_differ_are_parts_of_their_own():
    index = torch.zeros(3, 32, 5)
    kv_caches = {"a": PAIR, "a.index": index, "b": PAIR[:1], "c": (PAIR[0].half(), PAIR[1])}
    kv_caches = {
        name: tuple(each.clone() for each in row) if isinstance(row, tuple) else row
        for name, row in kv_caches.items()
    }
    layout, caches = described(kv_caches, arrangement="ascend", heads=2)
    found = [(part.role, part.layers, part.dtype) for part in layout.parts]
    assert found == [
        (0, ("a", "b"), "torch.float32"),
        (1, ("a", "c"), "torch.float32"),
        (0, ("a.index",), "torch.float32"),
        (0, ("c",), "torch.float16"),
    ]
    assert [len(each) for each in caches[:4]] == [2, 2, 1, 1]
