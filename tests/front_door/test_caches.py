# SPDX-License-Identifier: Apache-2.0
"""Caches of a node: allocated, registered, named, freed, copied and swapped."""

from __future__ import annotations

import pytest
import torch

import llm_datadist_torch as ld
from llm_datadist_torch import LLMParamError, RequestKey
from tests.devices import default_device
from tests.front_door.conftest import OpenNode
from tests.front_door.service import paint, values


@pytest.fixture
def node(open_node: OpenNode) -> ld.Node:
    return open_node(cluster_id=1)


def test_allocate(node: ld.Node):
    cache = node.allocate(layers=3, blocks=5, shape=(4, 2), dtype=torch.bfloat16)
    assert len(cache.tensors) == 6
    assert {(t.shape, t.dtype, t.device) for t in cache.tensors} == {
        ((5, 4, 2), torch.bfloat16, node.device)
    }
    assert cache.is_blocks_cache
    rows = node.allocate(layers=1, rows=5, shape=[4], tensors_per_layer=1)
    assert not rows.is_blocks_cache
    assert rows.tensors[0].dtype == torch.get_default_dtype()
    host = node.allocate(layers=1, blocks=1, shape=(4,), placement="host")
    assert host.tensors[0].device.type == "cpu"


def test_names(node: ld.Node):
    size = {"layers": 1, "blocks": 2, "shape": (4,)}
    first = node.allocate(name="kv", **size)
    assert node.cache("kv") is first
    with pytest.raises(LLMParamError, match="replace=True"):
        node.allocate(name="kv", **size)
    second = node.allocate(name="kv", replace=True, **size)  # a notebook's cell, run again
    assert first.ended
    assert node.cache("kv") is second
    node.free(second)
    node.free(second)
    with pytest.raises(KeyError):
        node.cache("kv")
    node.allocate(name="kv", **size)


def test_register(node: ld.Node):
    tensors = [torch.zeros(5, 4, device=default_device()) for _ in range(3)]
    cache = node.register(tensors, name="kv", tensors_per_layer=3)
    assert cache.layer(0) == cache.tensors
    cache.tensors[1][2] = 7
    assert tensors[1][2].tolist() == [7] * 4
    with pytest.raises(LLMParamError, match="taken"):
        node.register(tensors, name="kv", tensors_per_layer=1)
    node.free(cache)
    assert cache.ended
    rows = node.register(tensors, paged=False, tensors_per_layer=1, keys=[RequestKey(3)])
    assert not rows.is_blocks_cache


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"layers": 1, "shape": (1,)}, LLMParamError, "exactly one of blocks and rows"),
        ({"layers": 1, "shape": (1,), "blocks": 1, "rows": 1}, LLMParamError, "exactly one"),
        ({"layers": 0, "shape": (1,), "blocks": 1}, LLMParamError, "layers=0"),
        ({"layers": 1, "shape": (1,), "blocks": 0}, LLMParamError, "must be above 0"),
        ({"layers": 1, "shape": (1,), "blocks": 1.5}, TypeError, "float"),
        ({"layers": 1, "shape": 4, "blocks": 1}, TypeError, "int"),
        ({"layers": 1, "shape": (1,), "blocks": 1, "dtype": "half"}, TypeError, "dtype"),
        ({"layers": 1, "shape": (1,), "blocks": 1, "tensors_per_layer": 0}, LLMParamError, "=0"),
        ({"layers": 1, "shape": (1,), "blocks": 1, "placement": "hots"}, LLMParamError, "'host'"),
        ({"layers": 1, "shape": (1,), "blocks": 1, "name": ""}, LLMParamError, "empty"),
        ({"layers": 1, "shape": (1,), "blocks": 1, "keys": [RequestKey(1)]}, LLMParamError, "name"),
        ({"layers": 1, "shape": (1,), "rows": 1, "name": "kv"}, LLMParamError, "RequestKey"),
        ({"layers": 1, "shape": (1,), "rows": 1, "keys": [1]}, TypeError, r"keys\[0\]"),
        ({"layers": 1, "shape": (1,), "blocks": 1, "replace": 1}, TypeError, "replace"),
    ],
)
def test_wrong_caches(given, error, text, node: ld.Node):
    with pytest.raises(error, match=text):
        node.allocate(**given)


def test_wrong_registrations(node: ld.Node):
    tensor = torch.zeros(5, 4, device=default_device())
    for tensors, error in (([], LLMParamError), ([tensor], LLMParamError), ([1, 2], TypeError)):
        with pytest.raises(error):
            node.register(tensors)
    with pytest.raises(LLMParamError):
        node.register([tensor, torch.zeros(5, 3, device=default_device())])


def test_copy_and_swap(node: ld.Node):
    size = {"layers": 1, "blocks": 4, "shape": (4,), "dtype": torch.int32}
    device, host = node.allocate(**size), node.allocate(placement="host", **size)
    paint(device)
    node.copy_blocks(device, {0: 1, 1: [2, 3]})
    assert values(device)[0] == [0, 0, 1, 1]
    node.swap_blocks(device, host, {2: 0})
    assert values(host)[1][0] == 101
    node.copy_blocks(device, torch.tensor([[2, 0]]))
    assert values(device)[0] == [1, 0, 1, 1]


def test_tensors_per_layer_of_a_cache(node: ld.Node):
    cache = node.cache_manager.allocate_blocks_cache(ld.CacheDesc(6, [2, 4], torch.int8))
    assert cache.tensors_per_layer == 2
    cache.group_layers(3)
    assert len(cache.layer(1)) == 3
    assert len(cache.layer(1, 2)) == 2
    for wrong, error in ((4, LLMParamError), (0, LLMParamError), ("2", TypeError)):
        with pytest.raises(error):
            cache.group_layers(wrong)
    assert cache.tensors_per_layer == 3
