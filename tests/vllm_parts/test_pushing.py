# SPDX-License-Identifier: Apache-2.0
"""The workers' half of the connector with "push", without vLLM."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from msgspec.msgpack import decode

from llm_datadist_torch.vllm.layouts import Kind
from llm_datadist_torch.vllm.protocol import (
    NUMBERS_PER_MESSAGE,
    Asked,
    Place,
    Pushed,
    PushedSums,
    Where,
    encode,
    packed,
)
from llm_datadist_torch.vllm.steps import Expect, Push, PushEnd, Step
from llm_datadist_torch.vllm.worker import pushing, receiving
from llm_datadist_torch.vllm.worker.processes import this_process
from llm_datadist_torch.vllm.worker.pushing import Sender
from llm_datadist_torch.vllm.worker.service import TimeLimit
from tests.service import eventually
from tests.vllm_parts.workers import BLOCK, Worker, group, snapshot


@pytest.fixture
def worker(worker: Callable[..., Worker]) -> Callable[..., Worker]:
    return partial(worker, mode="push")


@pytest.fixture
def pair(worker: Callable[..., Worker]) -> tuple[Worker, Worker]:
    """A producer and a consumer."""
    return worker(8, 1), worker(20, 2)


def expect(d: Worker, blocks: tuple[int, ...], first: int, tokens: int, prompt: str = "x") -> None:
    groups = (blocks,) if blocks else ()
    d.half.step(Step(expects=[Expect("d", "t", groups, first, tokens, prompt)]))


def compute(p: Worker, d: Worker, blocks: tuple[int, ...], first: int, *, last: bool) -> None:
    """One step of the producer: all layers are there at once."""
    tokens = len(blocks) * BLOCK
    push = Push("p", "t", (d.half.address,), (blocks,), first * BLOCK, tokens, "x", last)
    p.half.before_compute(Step(pushes=[push]))
    for name in p.kv:
        p.half.layer_done(name)
    p.half.step_done()


def end(p: Worker) -> bool:
    """The producer's request has ended; whether its blocks are free, sooner or later."""
    p.half.before_compute(Step(push_ends=[PushEnd("p", "t", ())]))
    return p.freed("p")


@pytest.mark.parametrize("expected_first", [True, False])
def test_layers_arrive_where_they_belong(pair: tuple[Worker, Worker], expected_first: bool) -> None:
    p, d = pair
    right = snapshot(d)
    for step in (0, 1) if expected_first else (1, 0):
        if step:
            compute(p, d, (5, 2, 7), 0, last=True)
        else:
            expect(d, (11, 3, 19), 32, 90)
    assert not d.wait()
    for name, tensor in right.items():
        tensor[3], tensor[19] = p.kv[name][2], p.kv[name][7]
        assert torch.equal(d.kv[name], tensor)
    assert end(p)


def test_in_several_steps(pair: tuple[Worker, Worker]) -> None:
    p, d = pair
    expect(d, (1, 2, 3), 0, 70)
    compute(p, d, (4,), 0, last=False)
    compute(p, d, (4, 6), 1, last=False)
    assert not d.half.take_done().received
    compute(p, d, (4, 6, 7), 2, last=True)
    assert not d.wait()
    for name, tensor in d.kv.items():
        assert torch.equal(tensor[[1, 2, 3]], p.kv[name][[4, 6, 7]])
    assert end(p)


def test_nothing_is_wanted(pair: tuple[Worker, Worker]) -> None:
    p, d = pair
    right = snapshot(d)
    expect(d, (), 0, 0)
    compute(p, d, (4, 6), 0, last=True)
    assert end(p)
    assert all(torch.equal(d.kv[name], tensor) for name, tensor in right.items())


def test_the_producer_ends_early(pair: tuple[Worker, Worker]) -> None:
    p, d = pair
    expect(d, (1, 2), 32, 64)
    compute(p, d, (4,), 0, last=False)
    assert end(p)
    assert d.wait() == {2}


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("expected_first", [True, False])
def test_the_producer_ends_before_its_first_layer(
    pair: tuple[Worker, Worker], *, expected_first: bool, kept: bool
) -> None:
    """The consumer hears of it, also before it has asked, and does not wait for ``lease_s``."""
    p, d = pair
    if expected_first:
        expect(d, (1, 2), 32, 64)
    p.half.before_compute(Step(push_ends=[PushEnd("p", "t", (d.half.address,), kept)]))
    receiver = d.half._receiver
    assert receiver is not None
    if not expected_first:
        assert eventually(lambda: "t" in receiver._refused)
        expect(d, (1, 2), 32, 64)
    assert d.wait() == {2}
    assert p.freed("p") if kept else not p.half.take_done().sent


def test_the_consumer_gives_up(worker: Callable[..., Worker]) -> None:
    """Its engine gets the blocks back at once, and a producer hears that nothing is wanted."""
    p, d = worker(8, 1), worker(8, 2)
    right = snapshot(d)
    expect(d, (1, 2), 0, 64)
    expect(d, (), 0, 0)
    assert d.wait() == {1, 2}
    compute(p, d, (4, 6), 0, last=True)
    assert end(p)
    assert all(torch.equal(d.kv[name], tensor) for name, tensor in right.items())


def test_what_was_given_up_is_forgotten_after_a_while(
    worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "MAX_REFUSED", 2)
    p, d = worker(8, 1), worker(8, 2, lease_s=1.0)
    p.half._service.link(d.half.address, TimeLimit(20))
    receiver = d.half._receiver
    assert receiver is not None
    for name in "abc":
        request(p, d, Pushed("", name, "x", False))
    assert list(receiver._refused) == ["a", "b"]
    assert eventually(lambda: not d.half.take_done().sent and not receiver._refused)


@pytest.mark.parametrize("spoilt", [False, True])
def test_checksums_of_what_was_pushed(
    worker: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    spoilt: bool,
) -> None:
    """The consumer's setting counts; a prefix is there already, and a preempted part comes anew."""
    p, d = worker(8, 1), worker(20, 2, verify=True)
    notify = Sender._notify

    def spoil(*args: Any) -> None:
        if spoilt:
            d.kv["b"].view(torch.uint8)[19, 1, 3, 5] ^= 1
        notify(*args)

    monkeypatch.setattr(Sender, "_notify", spoil)
    expect(d, (11, 3, 19), 32, 90)
    compute(p, d, (5, 2), 0, last=False)
    compute(p, d, (6, 4, 7), 0, last=True)
    assert d.wait() == ({3, 19} if spoilt else set())
    assert ("differ in their checksums" in caplog.text) is spoilt
    if not spoilt:
        assert all(torch.equal(d.kv[name][[3, 19]], p.kv[name][[4, 7]]) for name in p.kv)
    assert end(p)


def where(p: Worker, d: Worker, transfer_id: str = "t") -> Place:
    """Where a producer may write."""
    question = Where(transfer_id, p.half.address, this_process())
    return decode(request(p, d, question), type=Place)


def request(p: Worker, d: Worker, question: Asked) -> bytes:
    return p.half._service.datadist.request(d.half.address.cluster_id, encode(question))


def test_checksums_that_are_missing(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(8, 2, verify=True)
    expect(d, (1, 2), 0, 64)
    p.half._service.link(d.half.address, TimeLimit(20))
    assert eventually(lambda: where(p, d).model_ids)
    request(p, d, Pushed(d.half.address.life, "t", p.half.address.life, True))
    assert d.wait() == {1, 2}


def test_nobody_pushes_and_late_bytes_find_nothing(
    worker: Callable[..., Worker],
) -> None:
    p, d = worker(8, 1), worker(8, 2, lease_s=1.0)
    right = snapshot(d)
    expect(d, (1, 2), 0, 64)
    assert d.wait() == {1, 2}
    compute(p, d, (4, 6), 0, last=True)
    # Nobody knows of it any more; the engine frees the blocks when the request ends all the same.
    p.half.before_compute(Step(push_ends=[PushEnd("p", "t", ())]))
    assert all(torch.equal(d.kv[name], tensor) for name, tensor in right.items())


def test_given_up_while_layers_come(
    worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine gets its blocks back when the producer has said that it stopped, not before."""
    p, d = worker(8, 1), worker(8, 2, lease_s=1.0, timeout_s=2.0)
    reached, go_on = threading.Event(), threading.Event()
    send_layer = Sender._send_layer

    def late(*args: Any) -> None:
        reached.set()
        assert go_on.wait(60)
        send_layer(*args)

    monkeypatch.setattr(Sender, "_send_layer", late)
    expect(d, (1, 2), 0, 64)
    compute(p, d, (4, 6), 0, last=True)
    assert reached.wait(60)
    done, _ = d.collect({"d"}, 2.5)
    assert not done.received
    go_on.set()
    assert d.wait() == {1, 2}
    right = snapshot(d)
    assert end(p)
    assert all(torch.equal(d.kv[name], tensor) for name, tensor in right.items())


def test_another_prompt(pair: tuple[Worker, Worker], caplog: pytest.LogCaptureFixture) -> None:
    p, d = pair
    expect(d, (1, 2), 0, 64, prompt="y")
    with caplog.at_level(logging.WARNING):
        compute(p, d, (4, 6), 0, last=True)
        assert d.wait() == {1, 2}
        assert end(p)
    assert eventually(lambda: "has another prompt" in caplog.text)


def test_other_kv(worker: Callable[..., Worker], caplog: pytest.LogCaptureFixture) -> None:
    p, d = worker(8, 1), worker(8, 2, rank=0, ranks=2)
    expect(d, (1, 2), 0, 64)
    with caplog.at_level(logging.WARNING):
        compute(p, d, (4, 6), 0, last=True)
        assert d.wait() == {1, 2}
        assert end(p)
    assert eventually(lambda: "has another KV" in caplog.text)


def test_a_peer_that_was_not_told_where(pair: tuple[Worker, Worker]) -> None:
    p, d = pair
    expect(d, (1, 2), 0, 64)
    p.half._service.link(d.half.address, TimeLimit(20))
    request(p, d, Pushed(d.half.address.life, "t", p.half.address.life, True))
    assert d.wait() == {1, 2}, "it can't have written"
    assert not where(p, d, "unknown").known


def test_an_engine_that_takes_no_pushes(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(8, 2, mode="pull")
    p.half._service.link(d.half.address, TimeLimit(20))
    with pytest.raises(ValueError, match="takes no pushes"):
        where(p, d)


def test_long_prompts_take_several_messages(
    worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (receiving, pushing):
        monkeypatch.setattr(module, "NUMBERS_PER_MESSAGE", 3)
    p, d = worker(20, 1), worker(20, 2, verify=True)
    blocks = tuple(range(1, 12))
    expect(d, tuple(reversed(blocks)), 0, 11 * BLOCK)
    compute(p, d, blocks, 0, last=True)
    assert not d.wait()
    for name, tensor in d.kv.items():
        assert torch.equal(tensor[list(reversed(blocks))], p.kv[name][list(blocks)])
    assert end(p)


def test_a_message_of_two_million_tokens_is_small_enough() -> None:
    """Blocks and checksums, at the size that they are split at."""
    numbers = packed([2**31 - 1] * NUMBERS_PER_MESSAGE)
    for message in (
        PushedSums("life", "t", 0, numbers, numbers),
        Place(known=True, blocks=numbers, model_ids=(2**63,) * 8, counts=(2**31,) * 8),
    ):
        assert len(encode(message)) < 1 << 20, "what a question may have"


def test_layers_that_share_a_tensor_wait_for_the_one_that_writes(
    worker: Callable[..., Worker],
) -> None:
    tensors = torch.randn(2, 8, 2, 32, 16)
    kv = {"a": tensors[0], "b": tensors[1], "c": tensors[0]}
    shared = torch.randn(2, 8, 2, 32, 16)
    p = worker(8, 1, kv=kv)
    d = worker(8, 2, kv={"a": shared[0], "b": shared[1], "c": shared[0]})
    expect(d, (5,), 0, 32)
    push = Push("p", "t", (d.half.address,), ((3,),), 0, 32, "x", True)
    p.half.before_compute(Step(pushes=[push]))
    p.half.layer_done("c")
    p.half.layer_done("b")
    assert not d.collect({"d"}, 0.3)[0].received
    # Only now the layer is there that the others share.
    tensors[0][3] = 7.0
    p.half.layer_done("a")
    p.half.step_done()
    assert not d.wait()
    assert torch.equal(shared[:, 5], tensors[:, 3])
    assert end(p)


def test_layers_that_nobody_told_of_go_out_with_the_step(pair: tuple[Worker, Worker]) -> None:
    """Recurrent layers, indexes and drafts: vLLM has no hook for them."""
    p, d = pair
    expect(d, (1,), 0, 32)
    push = Push("p", "t", (d.half.address,), ((4,),), 0, 32, "x", True)
    p.half.before_compute(Step(pushes=[push]))
    p.half.layer_done("a")
    p.half.step_done()
    assert not d.wait()
    assert all(torch.equal(d.kv[name][1], p.kv[name][4]) for name in p.kv)


def test_windows_and_states_are_pushed(worker: Callable[..., Worker]) -> None:
    """In chunks: what the consumer's window does not need it has no block for."""

    def made() -> dict[str, Any]:
        return {
            "full": torch.randn(20, 2, 32, 16),
            "sliding": torch.randn(20, 2, 32, 16),
            "state": [torch.randn(20, 24), torch.randn(20, 2, 8)],
        }

    groups = [
        group("full"),
        group("sliding", kind=Kind.WINDOW, window=40),
        group("state", kind=Kind.STATE, block=0),
    ]
    p = worker(20, 1, kv=made(), groups=groups)
    d = worker(20, 2, kv=made(), groups=groups, verify=True)
    wanted = ((1, 2, 3, 4), (0, 0, 7, 8), (9,))
    d.half.step(Step(expects=[Expect("d", "t", wanted, 0, 128, "x")]))
    there = ((11, 12, 13, 14), (15, 16, 17, 18), (19,))
    for first, stop in ((0, 50), (50, 128)):
        last = stop == 128
        push = Push("p", "t", (d.half.address,), there, first, stop, "x", last)
        p.half.before_compute(Step(pushes=[push]))
        p.half.step_done()
    assert not d.wait()
    assert torch.equal(d.kv["full"][[1, 2, 3, 4]], p.kv["full"][[11, 12, 13, 14]])
    assert torch.equal(d.kv["sliding"][[7, 8]], p.kv["sliding"][[17, 18]])
    for mine, theirs in zip(d.kv["state"], p.kv["state"], strict=True):
        assert torch.equal(mine[9], theirs[19])
    assert end(p)
