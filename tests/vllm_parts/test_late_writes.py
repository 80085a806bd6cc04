# SPDX-License-Identifier: Apache-2.0
"""Blocks that a frozen producer may still write are held back, and hold up nobody else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import pytest
import torch

from llm_datadist_torch.vllm.params import Peer
from llm_datadist_torch.vllm.steps import Expect, Push, Step
from tests.vllm_parts.workers import Worker

SPIN_S = 1.0
"""The producer spends this long between finding that it may write and writing."""


def produce(pipe: Connection, value: float, settings: dict[str, Any], slow: bool) -> None:
    """A producer in a process of its own, which is about to write when it says so."""
    torch.set_num_threads(1)
    from llm_datadist_torch.transports.choice import LinkChannel

    worker = Worker(8, 1, mode="push", **settings)
    for tensor in worker.kv.values():
        tensor.fill_(value)
    move = LinkChannel.move

    def slow_move(self: Any, movement: Any, deadline: Any) -> Any:
        if slow and "WRITE" in str(movement.direction):
            pipe.send("writing")
            end = time.monotonic() + SPIN_S
            while time.monotonic() < end:
                pass
        return move(self, movement, deadline)

    LinkChannel.move = slow_move  # type: ignore[method-assign]
    pipe.send(worker.half.address)
    while True:
        if pipe.poll(0.02):
            name, peer = pipe.recv()
            push = Push(name, name, (peer,), ((1,),), 0, 32, "x", True)
            worker.half.before_compute(Step(pushes=[push]))
            worker.half.step_done()
        worker.half.take_done()


class Producer(NamedTuple):
    pipe: Connection
    process: BaseProcess

    def wait_until_ready(self) -> None:
        assert self.pipe.poll(100)
        self.pipe.recv()

    def push(self, name: str, peer: Peer) -> None:
        self.pipe.send((name, peer))

    def freeze_in_a_write(self) -> None:
        assert self.pipe.poll(30)
        assert self.pipe.recv() == "writing"
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


@pytest.fixture
def producer() -> Iterator[Callable[..., Producer]]:
    made: list[Producer] = []
    context = get_context("spawn")

    def start(value: float = 7.0, *, slow: bool = True, **settings: Any) -> Producer:
        mine, theirs = context.Pipe()
        process = context.Process(target=produce, args=(theirs, value, settings, slow), daemon=True)
        process.start()
        made.append(Producer(mine, process))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.join(10)


def expect(d: Worker, name: str, block: int) -> None:
    d.half.step(Step(expects=[Expect(name, name, ((block,),), 0, 32, "x")]))


def give_up(d: Worker, name: str) -> None:
    d.half.step(Step(expects=[Expect(name, name, (), 0, 0, "")]))


def test_a_frozen_producer_wakes_up(
    worker: Callable[..., Worker], producer: Callable[..., Producer]
) -> None:
    d = worker(20, 2, mode="push", timeout_s=1.0)
    x = producer()
    x.wait_until_ready()
    expect(d, "x", 10)
    x.push("x", d.half.address)
    x.freeze_in_a_write()
    # Its link stays, as its process does.
    done, _ = d.collect({"x"}, 5.0)
    assert not done.received, "it may still write"
    x.signal(signal.SIGCONT)
    done, _ = d.collect({"x"}, 20.0)
    assert done.received == {"x"}
    for tensor in d.kv.values():
        tensor[10] = 1.0
    time.sleep(2 * SPIN_S)
    assert all(bool((tensor[10] == 1.0).all()) for tensor in d.kv.values())


def test_a_frozen_producer_is_killed(
    worker: Callable[..., Worker], producer: Callable[..., Producer]
) -> None:
    d = worker(20, 2, mode="push", timeout_s=1.0)
    x = producer()
    x.wait_until_ready()
    expect(d, "x", 10)
    x.push("x", d.half.address)
    x.freeze_in_a_write()
    give_up(d, "x")
    assert not d.collect({"x"}, 1.5)[0].received
    x.signal(signal.SIGKILL)
    done, _ = d.collect({"x"}, 20.0)
    assert done.failed == {"x": {10}}


@pytest.mark.thorough
def test_frozen_producers_use_up_no_threads(
    worker: Callable[..., Worker], producer: Callable[..., Producer]
) -> None:
    d = worker(20, 2, mode="push", threads=1, timeout_s=2.0)
    # They start side by side.
    frozen, y = [producer(), producer()], producer(3.0, slow=False)
    for each in (*frozen, y):
        each.wait_until_ready()
    for at, x in enumerate(frozen):
        expect(d, f"x{at}", 10 + at)
        x.push(f"x{at}", d.half.address)
        x.freeze_in_a_write()
        give_up(d, f"x{at}")
    expect(d, "y", 5)
    y.push("y", d.half.address)
    done, _ = d.collect({"y"}, 10.0)
    assert done.received == {"y"}
    assert not done.failed
    assert all(bool((tensor[5] == 3.0).all()) for tensor in d.kv.values())
