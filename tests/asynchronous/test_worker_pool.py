# SPDX-License-Identifier: Apache-2.0
"""The bounded pool of threads that runs background transfers."""

from __future__ import annotations

import logging
import threading

import pytest

from llm_datadist_torch import CacheTask, LLMException
from llm_datadist_torch.links import workers as workers_module
from llm_datadist_torch.links.work import Work
from llm_datadist_torch.links.workers import WorkerPool
from llm_datadist_torch.values.deadline import Deadline
from tests.asynchronous.helpers import FAILED, SUCCESS, TIMEOUT, WAIT_MS
from tests.asynchronous.jobs import Submit, succeed, wait_for
from tests.peers import eventually

pytestmark = pytest.mark.same_on_every_device


def test_threads_are_few_lazy_and_daemons(
    pool: WorkerPool, submit: Submit, gate: threading.Event
) -> None:
    assert pool.num_threads == 0
    first = submit(succeed)
    assert first.synchronize(WAIT_MS) == SUCCESS
    assert pool.num_threads == 1
    tasks = [submit(wait_for(gate)) for _ in range(20)]
    named = [t for t in threading.enumerate() if t.name.startswith("llmdd-test")]
    assert len(named) == pool.num_threads == 2
    assert all(thread.daemon for thread in named)
    gate.set()
    assert [task.synchronize(WAIT_MS) for task in tasks] == [SUCCESS] * 20


def test_work_runs_in_order_of_arrival(submit: Submit, gate: threading.Event) -> None:
    submit(wait_for(threading.Event()))  # takes one of both threads
    submit(wait_for(gate))
    order: list[int] = []
    tasks = [submit(lambda _, n=n: order.append(n), 0) for n in range(10)]
    gate.set()
    for task in tasks:
        task.synchronize(WAIT_MS)
    assert order == list(range(10))


def test_idle_threads_end(
    monkeypatch: pytest.MonkeyPatch, pool: WorkerPool, submit: Submit
) -> None:
    monkeypatch.setattr(workers_module, "IDLE_S", 0.01)
    assert submit(succeed).synchronize(WAIT_MS) == SUCCESS
    assert eventually(lambda: pool.num_threads == 0)
    assert submit(succeed).synchronize(WAIT_MS) == SUCCESS


def test_threads_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "IDLE_S", 0.01)
    pool = WorkerPool("kept", 3, keep=2)
    try:
        assert pool.num_threads == 2
        done = threading.Event()
        pool.submit(Work(lambda _: done.set(), 0))
        assert done.wait(WAIT_MS / 1000)
        assert not eventually(lambda: pool.num_threads < 2, seconds=0.2)
    finally:
        pool.close(Deadline.after_ms(WAIT_MS))
    assert eventually(lambda: pool.num_threads == 0)


def test_close(pool: WorkerPool, submit: Submit, gate: threading.Event) -> None:
    entered, moving = threading.Event(), threading.Event()

    def move(work: Work) -> None:
        with work.step(0):
            moving.set()
            assert gate.wait(60)
            work.succeed(0)

    hanging, busy = submit(wait_for(threading.Event(), entered)), submit(move)
    queued = submit(succeed)
    assert entered.wait(60)
    assert moving.wait(60)
    closing = threading.Thread(target=lambda: pool.close(Deadline.after_ms(WAIT_MS)))
    closing.start()
    assert hanging.synchronize(WAIT_MS) == queued.synchronize(WAIT_MS) == FAILED
    assert busy.synchronize(20) == TIMEOUT
    assert closing.is_alive()  # bytes still move
    gate.set()
    closing.join(60)
    assert not closing.is_alive()
    assert busy.synchronize(0) == SUCCESS
    assert pool.num_threads == 0
    with pytest.raises(LLMException, match="finalized"):
        submit(succeed)


def test_a_callback_may_close_the_pool(pool: WorkerPool, submit: Submit) -> None:
    closed = threading.Event()

    def close(_: CacheTask) -> None:
        pool.close(Deadline.after_ms(WAIT_MS))
        closed.set()

    submit(succeed).add_done_callback(close)
    assert closed.wait(60)


def test_release_that_fails(submit: Submit, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)

    def release() -> None:
        raise RuntimeError("broken release")

    assert submit(succeed, release=release).synchronize(WAIT_MS) == SUCCESS
    assert "broken release" in caplog.text
