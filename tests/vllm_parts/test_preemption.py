# SPDX-License-Identifier: Apache-2.0
"""With "push" a producer's request is preempted: what is in its blocks then is not its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from llm_datadist_torch.vllm.steps import Step
from llm_datadist_torch.vllm.worker.pushing import Sender
from tests.vllm_parts.test_pushing import compute, end, expect
from tests.vllm_parts.workers import Worker


@pytest.fixture
def pair(worker: Callable[..., Worker]) -> tuple[Worker, Worker]:
    """A producer and a consumer."""
    made = partial(worker, mode="push")
    return made(8, 1), made(20, 2)


def test_computed_again_after_a_preemption(pair: tuple[Worker, Worker]) -> None:
    p, d = pair
    expect(d, (1, 2), 0, 64)
    compute(p, d, (4,), 0, last=False)
    compute(p, d, (6, 7), 0, last=True)
    assert not d.wait()
    for name, tensor in d.kv.items():
        assert torch.equal(tensor[[1, 2]], p.kv[name][[6, 7]])
    assert end(p)


def preempt(p: Worker, blocks: list[int]) -> None:
    """The producer's request loses its blocks, and others write to them."""
    p.half.preempted(Step(preempted=("p", "another")))
    for tensor in p.kv.values():
        tensor[blocks] = torch.inf


def test_preempted_before_all_was_sent(pair: tuple[Worker, Worker]) -> None:
    p, d = pair
    compute(p, d, (4, 6), 0, last=True)
    preempt(p, [4, 6])
    expect(d, (1, 2), 0, 64)
    compute(p, d, (6, 7), 0, last=True)
    assert not d.wait()
    for name, tensor in d.kv.items():
        assert torch.equal(tensor[[1, 2]], p.kv[name][[6, 7]])
    assert end(p)


@pytest.mark.parametrize("while_it_is_sent", [False, True])
def test_preempted_and_never_computed_again(
    pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch, while_it_is_sent: bool
) -> None:
    p, d = pair
    reached, go_on = threading.Event(), threading.Event()
    send_layer = Sender._send_layer

    def slow(sender: Sender, sending: Any, peer: Any, layer: Any) -> None:
        if layer.name == "c" and while_it_is_sent:
            reached.set()
            assert go_on.wait(60)
        send_layer(sender, sending, peer, layer)

    monkeypatch.setattr(Sender, "_send_layer", slow)
    if while_it_is_sent:
        expect(d, (1, 2), 0, 64)
    compute(p, d, (4, 6), 0, last=True)
    if while_it_is_sent:
        assert reached.wait(60)
    preempt(p, [4, 6])
    go_on.set()
    assert end(p)
    if not while_it_is_sent:
        expect(d, (1, 2), 0, 64)
    assert d.wait() == {1, 2}
