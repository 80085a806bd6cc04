# SPDX-License-Identifier: Apache-2.0
"""The workers' half of the connector with "push", without vLLM."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from msgspec.msgpack import decode

from llm_datadist_torch.vllm import receiving
from llm_datadist_torch.vllm.protocol import Place, Pushed, Where, encode
from llm_datadist_torch.vllm.pushing import Sender
from llm_datadist_torch.vllm.steps import Expect, Push, PushEnd, Step
from tests.service import settle
from tests.vllm_parts.test_worker import Worker, snapshot


@pytest.fixture
def worker() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(*args: Any, **kwargs: Any) -> Worker:
        made.append(Worker(*args, **{"mode": "push"} | kwargs))
        return made[-1]

    yield make
    for each in made:
        each.half.close()


@pytest.fixture
def pair(worker: Callable[..., Worker]) -> tuple[Worker, Worker]:
    """A producer and a consumer."""
    return worker(8, 1), worker(20, 2)


def expect(d: Worker, blocks: tuple[int, ...], first: int, tokens: int, prompt: str = "x") -> None:
    d.half.step(Step(expects=[Expect("d", "t", blocks, first, tokens, prompt)]))


def compute(p: Worker, d: Worker, blocks: tuple[int, ...], first: int, *, last: bool) -> None:
    """One step of the producer: all layers are there at once."""
    push = Push("p", "t", (d.half.address,), blocks, first, "x", last)
    p.half.before_compute(Step(pushes=[push]))
    for name, tensor in p.kv.items():
        p.half.layer_done(name, tensor)


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
    assert d.half.take_done()[1] == set()
    compute(p, d, (4, 6, 7), 2, last=True)
    assert not d.wait()
    for name, tensor in d.kv.items():
        assert torch.equal(tensor[[1, 2, 3]], p.kv[name][[4, 6, 7]])
    assert end(p)


def test_computed_again_after_a_preemption(pair: tuple[Worker, Worker]) -> None:
    p, d = pair
    expect(d, (1, 2), 0, 64)
    compute(p, d, (4,), 0, last=False)
    compute(p, d, (6, 7), 0, last=True)
    assert not d.wait()
    for name, tensor in d.kv.items():
        assert torch.equal(tensor[[1, 2]], p.kv[name][[6, 7]])
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
        assert settle(lambda: "t" in receiver._refused)
        expect(d, (1, 2), 32, 64)
    assert d.wait() == {2}
    assert p.freed("p") if kept else not p.half.take_done()[0]


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
    p.half._service.link(d.half.address, 20_000)
    receiver = d.half._receiver
    assert receiver is not None
    for name in "abc":
        p.half._service.datadist.ask(d.half.address[0], encode(Pushed(name, False)))
    assert list(receiver._refused) == ["a", "b"]
    assert settle(lambda: not d.half.take_done()[0] and not receiver._refused)


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
    layers_to = Sender._layers_to

    def spoil(*args: Any) -> bool:
        complete = layers_to(*args)
        if spoilt:
            d.kv["b"].view(torch.uint8)[19, 1, 3, 5] ^= 1
        return complete

    monkeypatch.setattr(Sender, "_layers_to", spoil)
    expect(d, (11, 3, 19), 32, 90)
    compute(p, d, (5, 2), 0, last=False)
    compute(p, d, (6, 4, 7), 0, last=True)
    assert d.wait() == ({3, 19} if spoilt else set())
    assert ("differ in their checksums" in caplog.text) is spoilt
    if not spoilt:
        assert all(torch.equal(d.kv[name][[3, 19]], p.kv[name][[4, 7]]) for name in p.kv)
    assert end(p)


def test_checksums_that_are_missing(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(8, 2, verify=True)
    expect(d, (1, 2), 0, 64)
    p.half._service.link(d.half.address, 20_000)
    ask = p.half._service.datadist.ask
    peer = d.half.address[0]
    assert settle(lambda: decode(ask(peer, encode(Where("t"))), type=Place).model_ids != ())
    ask(peer, encode(Pushed("t", True)))
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
    p, d = worker(8, 1), worker(8, 2, lease_s=2.0)
    go_on = threading.Event()
    send_layer = Sender._send_layer

    def late(*args: Any) -> None:
        assert go_on.wait(60)
        send_layer(*args)

    monkeypatch.setattr(Sender, "_send_layer", late)
    expect(d, (1, 2), 0, 64)
    compute(p, d, (4, 6), 0, last=True)
    assert d.wait() == {1, 2}
    right = snapshot(d)
    go_on.set()
    assert end(p)
    assert all(torch.equal(d.kv[name], tensor) for name, tensor in right.items())


def test_the_producer_is_gone(pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    p, d = pair
    reached, go_on = threading.Event(), threading.Event()

    def stuck(*args: Any) -> None:
        reached.set()
        assert go_on.wait(60)

    monkeypatch.setattr(Sender, "_send_layer", stuck)
    expect(d, (1, 2), 0, 64)
    compute(p, d, (4, 6), 0, last=True)
    assert reached.wait(60)
    # As if its process had died.
    p.half._service.close()
    assert d.wait() == {1, 2}
    go_on.set()


def test_another_prompt(pair: tuple[Worker, Worker], caplog: pytest.LogCaptureFixture) -> None:
    p, d = pair
    expect(d, (1, 2), 0, 64, prompt="y")
    with caplog.at_level(logging.WARNING):
        compute(p, d, (4, 6), 0, last=True)
        assert d.wait() == {1, 2}
        assert end(p)
    assert settle(lambda: "has another prompt" in caplog.text)


def test_other_kv(worker: Callable[..., Worker], caplog: pytest.LogCaptureFixture) -> None:
    p, d = worker(8, 1), worker(8, 2, rank=0, ranks=2)
    expect(d, (1, 2), 0, 64)
    with caplog.at_level(logging.WARNING):
        compute(p, d, (4, 6), 0, last=True)
        assert d.wait() == {1, 2}
        assert end(p)
    assert settle(lambda: "has another KV" in caplog.text)


def test_a_peer_that_was_not_told_where(pair: tuple[Worker, Worker]) -> None:
    p, d = pair
    expect(d, (1, 2), 0, 64)
    peer = d.half.address
    p.half._service.link(peer, 20_000)
    ask = p.half._service.datadist.ask
    ask(peer[0], encode(Pushed("t", True)))
    assert d.wait() == {1, 2}, "it can't have written"
    ask(peer[0], encode(Where("unknown")))


def test_an_engine_that_takes_no_pushes(worker: Callable[..., Worker]) -> None:
    p, d = worker(8, 1), worker(8, 2, mode="pull")
    p.half._service.link(d.half.address, 20_000)
    with pytest.raises(ValueError, match="takes no pushes"):
        p.half._service.datadist.ask(d.half.address[0], encode(Where("t")))
