# SPDX-License-Identifier: Apache-2.0
"""Layer by layer: pushes that follow the compute, pulls that run ahead of it."""

from __future__ import annotations

import pytest
import torch

import llm_datadist_torch as ld
from llm_datadist_torch import LLMParamError
from tests.front_door.conftest import OpenNode
from tests.front_door.service import paint, values

SIZE = {"layers": 4, "blocks": 4, "shape": (4,), "dtype": torch.int32}


@pytest.fixture(params=[1, 2, 3])
def linked(request: pytest.FixtureRequest, processes, open_node: OpenNode):
    """A process with a painted cache "kv", a cache here of other values, and the peer."""
    size = {**SIZE, "tensors_per_layer": request.param}
    far = processes()
    address = far.call("open", cluster_id=1)
    far.call("allocate", name="kv", **size)
    node = open_node()
    cache = node.allocate(**size)
    paint(cache, plus=10_000)
    return far, cache, node.connect(address)


def test_a_pull_yields_layers_as_they_arrive(linked):
    _, cache, peer = linked
    seen = []
    with peer.pull_layers("kv", cache, [1], [2]) as pull:
        for layer in pull:
            seen.append(layer)
            first = layer * cache.tensors_per_layer * 100
            assert int(cache.layer(layer)[0][2, 0]) == first + 1
    assert seen == [0, 1, 2, 3]
    assert [row[2] for row in values(cache)] == [100 * at + 1 for at in range(len(cache.tensors))]


def test_part_of_the_layers(linked):
    _, cache, peer = linked
    with peer.pull_layers("kv", cache, [1], layers=range(1, 3)) as pull:
        pull.wait(2)
        with pytest.raises(LLMParamError, match="was not started"):
            pull.wait(0)
    per_layer = cache.tensors_per_layer
    moved = [row[1] < 10_000 for row in values(cache)]
    assert moved == [False] * per_layer + [True] * 2 * per_layer + [False] * per_layer


def test_a_push_sends_each_layer_when_it_is_ready(linked):
    far, cache, peer = linked
    with peer.push_layers("kv", cache, [0, 1], [3, 2]) as push:
        for layer in range(4):
            for tensor in cache.layer(layer):
                tensor.add_(1)
            push.ready()
            if layer == 1:
                push.wait(0)
                push.wait()
    tensors = [torch.frombuffer(bytearray(each), dtype=torch.int32) for each in far.call("data")]
    for at, tensor in enumerate(tensors):
        base = 100 * at
        assert tensor.view(4, 4)[:, 0].tolist() == [base, base + 1, base + 10_002, base + 10_001]


def test_layers_in_any_order_and_each_once(linked):
    _, cache, peer = linked
    with peer.push_layers("kv", cache, layers=range(1, 3)) as push:
        push.ready(2)
        for wrong, text in ((2, "sent before"), (0, "not in")):
            with pytest.raises(LLMParamError, match=text):
                push.ready(wrong)
        push.ready()
        with pytest.raises(LLMParamError, match="have been sent"):
            push.ready()


def test_a_layer_that_was_forgotten_is_an_error(linked):
    _, cache, peer = linked

    def forget() -> None:
        with peer.push_layers("kv", cache) as push:
            push.ready(0)
            push.ready(2)

    with pytest.raises(ld.LLMException, match="2 of 4 layers were never sent, 1 first"):
        forget()


def test_what_fails_is_raised_at_the_end_of_the_block(linked):
    _, cache, peer = linked
    with (
        pytest.raises(ld.LLMCacheNotFoundError),
        peer.push_layers("other", cache, layers=range(1)) as push,
    ):
        push.ready()
    with pytest.raises(ld.LLMCacheNotFoundError), peer.pull_layers("other", cache) as pull:
        list(pull)


def test_the_blocks_own_error_goes_first(linked):
    _, cache, peer = linked
    with (
        pytest.raises(ZeroDivisionError),
        peer.pull_layers("kv", cache, [0]) as pull,
    ):
        raise ZeroDivisionError
    assert all(task.done() for task in pull._tasks.values())
