# SPDX-License-Identifier: Apache-2.0
"""``CacheTask``, with jobs that move nothing (reference API, 10.4)."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from llm_datadist_torch import CacheTask, LLMException, LLMTimeoutError
from llm_datadist_torch.links.work import Work
from llm_datadist_torch.links.workers import WorkerPool
from llm_datadist_torch.values.status import error_for
from tests.asynchronous.helpers import FAILED, PI, SUCCESS, TIMEOUT, UNKNOWN, WAIT_MS
from tests.asynchronous.jobs import Submit, succeed, wait_for
from tests.peers import eventually

# -- waiting --------------------------------------------------------------------------------------


def test_poll_then_success(submit: Submit, gate: threading.Event) -> None:
    task = submit(wait_for(gate), 2)
    assert not task.done()
    assert task.synchronize(0) == TIMEOUT
    assert task.synchronize(timeout_in_millis=1) == TIMEOUT
    assert task.get_results(0) == [TIMEOUT, TIMEOUT]
    assert task.exception() is None
    gate.set()
    assert task.synchronize() == SUCCESS
    assert task.done()
    assert task.get_results() == task.get_results(0) == [SUCCESS, SUCCESS]
    assert task.exception() is None
    assert not task.cancelled()


@pytest.mark.parametrize("timeout", ["1", 1.0, [1]], ids=str)
def test_timeout_types(submit: Submit, timeout: object) -> None:
    task = submit(succeed)
    for wait in (task.synchronize, task.get_results):
        with pytest.raises(TypeError):
            wait(timeout)


@pytest.mark.parametrize("timeout", [-1, 2**32])
def test_timeout_range(submit: Submit, timeout: int) -> None:
    task = submit(succeed)
    for wait in (task.synchronize, task.get_results):
        with pytest.raises(ValueError, match="out of range"):
            wait(timeout)
    assert task.synchronize(2**32 - 1) == SUCCESS


def test_many_may_wait(submit: Submit, gate: threading.Event) -> None:
    task = submit(wait_for(gate))
    answers: list[object] = []
    threads = [
        threading.Thread(target=lambda: answers.append(task.synchronize())) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(60)
    assert answers == [SUCCESS] * 5


# -- failing --------------------------------------------------------------------------------------


def test_the_first_failure_in_order_counts(submit: Submit) -> None:
    errors = [error_for(code, code.name) for code in (PI, TIMEOUT)]

    def job(work: Work) -> None:
        work.fail(3, errors[1])
        work.fail(1, errors[0])
        work.fail(1, errors[1])  # what stands, stands
        work.succeed(1)
        work.succeed(0)

    task = submit(job, 4)
    assert task.get_results(WAIT_MS) == [SUCCESS, PI, None, TIMEOUT]
    assert task.synchronize() == PI
    assert task.exception() is errors[0]


def test_a_result_that_is_missing_is_a_failure(submit: Submit) -> None:
    """Section 14, 2: the reference says success."""
    task = submit(lambda work: work.succeed(0), 2)
    assert task.synchronize(WAIT_MS) == FAILED
    assert task.get_results() == [SUCCESS, None]
    assert task.exception().status_code == FAILED


@pytest.mark.parametrize("error", [RuntimeError("{braces}"), SystemExit(3), KeyboardInterrupt()])
def test_a_job_that_breaks_off(
    submit: Submit, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def job(work: Work) -> None:
        with work.step(0):
            work.succeed(0)
        with work.step(1):
            raise error

    task = submit(job, 3)
    assert task.synchronize(WAIT_MS) == UNKNOWN
    assert task.get_results() == [SUCCESS, UNKNOWN, None]
    assert task.exception().__cause__ is error
    assert type(error).__name__ in caplog.text
    assert submit(succeed).synchronize(WAIT_MS) == SUCCESS


def test_a_job_that_breaks_off_before_it_began(submit: Submit) -> None:
    def job(_: Work) -> None:
        raise RuntimeError("early")

    assert submit(job, 2).get_results(WAIT_MS) == [UNKNOWN, UNKNOWN]


def test_a_failure_is_never_success(submit: Submit) -> None:
    """The default status of an LLMException is success."""
    task = submit(lambda work: work.fail(0, LLMException("odd")))
    assert task.synchronize(WAIT_MS) == FAILED


def test_errors_keep_nothing_alive(submit: Submit) -> None:
    class Large:
        pass

    kept: list[weakref.ref[Large]] = []

    def job(work: Work) -> None:
        large = Large()
        kept.append(weakref.ref(large))
        try:
            raise error_for(PI, "wrong")
        except LLMException as error:
            work.fail(0, error)

    task = submit(job)
    assert task.synchronize(WAIT_MS) == PI
    del job
    gc.collect()
    assert eventually(lambda: kept[0]() is None)


# -- cancelling -----------------------------------------------------------------------------------


def test_cancel_what_is_queued(submit: Submit, gate: threading.Event) -> None:
    busy = [submit(wait_for(gate)) for _ in range(2)]
    released = threading.Event()
    ran = threading.Event()
    task = submit(lambda _: ran.set(), 2, release=released.set)
    assert task.cancel() is True
    assert task.done()
    assert task.cancelled()
    assert released.is_set()
    assert task.get_results(0) == [None, None]
    assert task.synchronize(0) == FAILED
    assert task.exception().status_code == FAILED
    assert task.cancel() is False
    gate.set()
    assert [each.synchronize(WAIT_MS) for each in busy] == [SUCCESS, SUCCESS]
    assert not ran.is_set()


def test_cancel_while_bytes_move(submit: Submit, gate: threading.Event) -> None:
    entered = threading.Event()

    def job(work: Work) -> None:
        with work.step(0):
            entered.set()
            assert gate.wait(60)
        with work.step(1):
            work.succeed(1)

    task = submit(job, 2)
    assert entered.wait(60)
    assert task.cancel() is True
    assert not task.done()
    assert task.synchronize(1) == TIMEOUT
    gate.set()
    assert task.get_results(WAIT_MS) == [FAILED, None]
    assert task.cancelled()


def test_cancel_too_late(submit: Submit, gate: threading.Event) -> None:
    entered = threading.Event()

    def job(work: Work) -> None:
        with work.step(0):
            entered.set()
            assert gate.wait(60)
            work.succeed(0)

    task = submit(job)
    assert entered.wait(60)
    assert task.cancel() is True
    gate.set()
    assert task.synchronize(WAIT_MS) == SUCCESS
    assert not task.cancelled()
    assert task.cancel() is False


def test_cancelled_waits_do_not_use_up_the_pool(
    submit: Submit, pool: WorkerPool, gate: threading.Event
) -> None:
    """A synchronizer that never returns costs a thread, not the pool."""
    for _ in range(5):
        entered = threading.Event()
        task = submit(wait_for(gate, entered))
        assert entered.wait(60)
        assert task.cancel()
        assert task.done()
    assert submit(succeed).synchronize(WAIT_MS) == SUCCESS
    assert pool.num_threads <= 2
    gate.set()
    assert task.get_results(0) == [None]


# -- callbacks and await --------------------------------------------------------------------------


def test_callbacks(submit: Submit, gate: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    task = submit(wait_for(gate))
    seen: list[tuple[str, CacheTask, bool]] = []
    task.add_done_callback(lambda done: seen.append(("first", done, done.done())))
    task.add_done_callback(lambda _: 1 / 0)
    task.add_done_callback(lambda done: seen.append(("third", done, done.done())))
    assert not seen
    gate.set()
    assert eventually(lambda: len(seen) == 2)
    assert seen == [("first", task, True), ("third", task, True)]
    assert "ZeroDivisionError" in caplog.text
    task.add_done_callback(lambda done: seen.append(("late", done, True)))
    assert seen[-1] == ("late", task, True)
    assert submit(succeed).synchronize(WAIT_MS) == SUCCESS


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_callbacks_after_one_that_ends_the_thread(
    submit: Submit, gate: threading.Event, error: BaseException
) -> None:
    def leave(_: CacheTask) -> None:
        raise error

    task = submit(wait_for(gate))
    seen: list[str] = []
    task.add_done_callback(lambda _: seen.append("first"))
    task.add_done_callback(leave)
    task.add_done_callback(lambda _: seen.append("third"))
    gate.set()
    assert eventually(lambda: len(seen) == 2)
    assert seen == ["first", "third"]
    assert submit(succeed).synchronize(WAIT_MS) == SUCCESS


def test_await(submit: Submit, gate: threading.Event) -> None:
    async def several() -> list[object]:
        tasks = [submit(wait_for(gate)), submit(succeed)]
        waiting = asyncio.gather(*tasks, tasks[0], return_exceptions=True)
        await asyncio.sleep(0)
        assert not tasks[0].done()
        gate.set()
        return await waiting

    assert asyncio.run(several()) == [SUCCESS, SUCCESS, SUCCESS]


def test_await_raises_what_failed(submit: Submit, gate: threading.Event) -> None:
    async def one(task: CacheTask) -> object:
        return await task

    error = error_for(TIMEOUT, "late")
    with pytest.raises(LLMTimeoutError) as raised:
        asyncio.run(one(submit(lambda work: work.fail(0, error))))
    assert raised.value is error
    task = submit(wait_for(gate))
    task.cancel()
    with pytest.raises(LLMException, match="stopped"):
        asyncio.run(one(task))


def test_a_cancelled_coroutine_leaves_the_task_alone(submit: Submit, gate: threading.Event) -> None:
    async def give_up(task: CacheTask) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(task), 0.01)

    async def _awaited(task: CacheTask) -> object:
        return await task

    task = submit(wait_for(gate))
    asyncio.run(give_up(task))
    gate.set()  # its loop is closed by now
    assert task.synchronize(WAIT_MS) == SUCCESS


def test_repr(submit: Submit) -> None:
    task = submit(lambda work: work.succeed(0), 2)
    task.synchronize(WAIT_MS)
    assert repr(task) == "CacheTask(done, layers=0/1, ['LLM_SUCCESS', '-'])"
