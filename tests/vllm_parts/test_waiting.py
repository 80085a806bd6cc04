# SPDX-License-Identifier: Apache-2.0
"""Waiting for one peer delays no other, and what comes too early is tried again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch

from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.steps import Expect, Pull, Push, PushEnd, Step
from llm_datadist_torch.vllm.worker.lanes import Lanes
from tests.vllm_parts.workers import Worker


@pytest.fixture
def silent() -> Iterator[Peer]:
    """A peer that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield Peer(999, "127.0.0.1", listener.getsockname()[1], "life")


def test_a_peer_that_never_answers(worker: Callable[..., Worker], silent: Peer) -> None:
    y, d = worker(8, 1), worker(64, 2, timeout_s=2.0, threads=4)
    remote = y.grant([1], 32)
    to_nobody = msgspec.structs.replace(remote, remote_peers=(silent,))
    pulls = [Pull(f"x{at}", to_nobody, ((10 + at,),), 0, 32) for at in range(20)]
    d.half.step(Step(pulls=[*pulls, Pull("y", remote, ((6,),), 0, 32)]))
    done, times = d.collect({f"x{at}" for at in range(20)} | {"y"})
    assert set(done.failed) == {f"x{at}" for at in range(20)}
    assert all(torch.equal(d.kv[name][6], y.kv[name][1]) for name in y.kv)
    order = sorted(times, key=lambda name: times[name])
    assert order[0] == "y", "the healthy one comes first"


def test_link_events_do_not_wait_for_dials(worker: Callable[..., Worker], silent: Peer) -> None:
    z, d = worker(8, 1), worker(64, 2, timeout_s=5.0, threads=2)
    assert not d.pull(z.grant([1], 32), [5], 0, 32)
    to_nobody = msgspec.structs.replace(z.grant([2], 32), remote_peers=(silent,))
    d.half.step(Step(pulls=[Pull(f"x{at}", to_nobody, ((10 + at,),), 0, 32) for at in range(8)]))
    service = d.half._service
    ended = threading.Event()
    forgetting = threading.Thread(
        target=lambda: (service.link_changed(silent.cluster_id, lost=True), ended.set())
    )
    forgetting.start()
    assert ended.wait(1), "it has returned while the peer is being dialled"
    done, _ = d.collect({f"x{at}" for at in range(8)})
    assert len(done.failed) == 8


def push(p: Worker, d: Worker, name: str, blocks: tuple[int, ...]) -> None:
    """Compute a prompt at the producer, whose request then ends."""
    push = Push(name, name, (d.half.address,), (blocks,), 0, 32 * len(blocks), "x", True)
    p.half.before_compute(Step(pushes=[push]))
    for layer in p.kv:
        p.half.layer_done(layer)
    p.half.step_done()
    p.half.before_compute(Step(push_ends=[PushEnd(name, name, (d.half.address,))]))


def expect(d: Worker, name: str, blocks: tuple[int, ...]) -> None:
    d.half.step(Step(expects=[Expect(name, name, (blocks,), 0, 32 * len(blocks), "x")]))


def test_pushes_in_opposite_order(worker: Callable[..., Worker]) -> None:
    """The producer has one thread, and computes A first; the consumer has room for one, and
    admits B first."""
    p = worker(8, 1, mode="push", threads=1, lease_s=60.0)
    d = worker(20, 2, mode="push", lease_s=60.0)
    push(p, d, "A", (1, 2))
    push(p, d, "B", (3, 4))
    for name in "BA":
        expect(d, name, (5, 6))
        done, _ = d.collect({name})
        assert name in done.received
        assert not done.failed


def test_a_push_to_a_consumer_that_is_starting(worker: Callable[..., Worker]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    p = worker(8, 1, mode="push")
    peer = Peer(77, "127.0.0.1", port)
    p.half.before_compute(Step(pushes=[Push("t", "t", (peer,), ((1, 2),), 0, 64, "x", True)]))
    p.half.step_done()
    assert not p.half.take_done().sent
    d = worker(20, 2, mode="push", cluster_id=77, port=port)
    expect(d, "t", (5, 6))
    done, _ = d.collect({"t"})
    assert done.received == {"t"}
    assert not done.failed
    assert all(torch.equal(d.kv[name][[5, 6]], p.kv[name][[1, 2]]) for name in p.kv)


def test_lanes_take_turns_and_expire() -> None:
    lanes = Lanes("test", 1)
    go_on, ran = threading.Event(), []
    expired = threading.Event()
    try:
        lanes.submit("a", lambda: go_on.wait(30))
        lanes.submit("a", lambda: ran.append("late"), within_s=0.05, expired=expired.set)
        lanes.submit("a", lambda: ran.append("second"))
        other = threading.Event()
        lanes.submit("b", other.set)
        assert other.wait(30), "another lane does not wait"
        assert expired.wait(30)
        last = threading.Event()
        lanes.later(0.01, "a", last.set)
        go_on.set()
        assert last.wait(30)
        assert ran == ["second"]
    finally:
        go_on.set()
        lanes.close(5)
    lanes.submit("a", lambda: ran.append("closed"))
    assert ran == ["second"]


def test_a_job_that_fails_costs_no_thread() -> None:
    lanes = Lanes("test", 1)
    try:
        for _ in range(20):
            lanes.submit("a", lambda: 1 / 0)
        done = threading.Event()
        lanes.submit("a", done.set)
        assert done.wait(30)
        assert lanes.num_threads <= 3
    finally:
        lanes.close(5)
