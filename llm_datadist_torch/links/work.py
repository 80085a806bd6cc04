# SPDX-License-Identifier: Apache-2.0
"""``CacheTask``: an operation in the background, as its caller and as its worker see it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from llm_datadist_torch.values.checks import check_uint32
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")


class StopWorkError(Exception):
    """What remains of the work is not to be started: it was cancelled, or can't go on."""


class Work:
    """The worker's side of a task: results as they come, and whether to go on.

    A piece of work is queued, then runs, then is sealed: from then on nothing changes it, and it
    moves no bytes. A thread that cancels it while it is queued, or while it waits for an event,
    seals it; while bytes move, the worker seals it at the end of that step.

    Thread safety: all methods may be called from any thread, ``run`` once. ``step`` and the results
    belong to the thread that runs. Callbacks and ``release`` are called without the lock.

    Args:
        job: What to do; it gets this object. Raises whatever it likes.
        num_results: Results that it will have.
        layers_total: Layers that it will go through.
        release: Gives back what the work holds; called once, before the work counts as done.
    """

    def __init__(
        self,
        job: Callable[[Work], None],
        num_results: int,
        *,
        layers_total: int = 1,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.layers_total = layers_total
        self.layers_done = 0
        self._job = job
        self._release = release
        # Taken as a lock, not as the condition: Ctrl-C must not come between taking it and the
        # block that releases it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._results: list[LLMStatusCode | None] = [None] * num_results
        self._errors: list[LLMException | None] = [None] * num_results
        self._started = [False] * num_results
        self._callbacks: list[Callable[[], None]] = []
        self._replace: Callable[[], None] | None = None
        self._cancelled = self._moving = self._sealed = self._done = self._cut_short = False

    # -- for the worker ---------------------------------------------------------------------------

    def run(self, replace: Callable[[], None]) -> bool:
        """Do the work; blocks until it is done.

        Args:
            replace: Called when the work is cancelled in a wait that nobody can end: this thread is
                lost to its owner until then.

        Returns:
            Whether the thread is still its owner's: ``replace`` has not been called.
        """
        with self._lock:
            if self._sealed:
                return True
            self._replace = replace
        try:
            self._job(self)
        except StopWorkError:
            pass
        except BaseException as error:  # noqa: BLE001  a thread that dies would leave its task undone
            self._break(error)
        with self._lock:
            mine, self._replace = self._replace is not None, None
        self._seal()
        return mine

    def check(self) -> None:
        """Raise if the work has been cancelled.

        Raises:
            StopWorkError: It has.
        """
        if self._cancelled:
            raise StopWorkError

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """Move bytes for result ``index``: nobody seals the work meanwhile.

        Raises:
            StopWorkError: The work has been cancelled.
        """
        with self._lock:
            self.check()
            self._moving = self._started[index] = True
        try:
            yield
        finally:
            with self._lock:
                self._moving = False

    def succeed(self, index: int) -> None:
        """All of result ``index`` has been done. A result that stands is not changed."""
        with self._lock:
            if not self._sealed and self._results[index] is None:
                self._results[index] = LLMStatusCode.LLM_SUCCESS

    def fail(self, index: int, error: LLMException) -> None:
        """Result ``index`` is this error. A result that stands is not changed."""
        with self._lock:
            if self._sealed or self._results[index] is not None:
                return
            status = error.status_code
            # A plain LLMException may carry success, which a failure must not be reported as.
            failed = status != LLMStatusCode.LLM_SUCCESS
            self._results[index] = status if failed else LLMStatusCode.LLM_FAILED
            # Its frames would keep caches alive for as long as somebody keeps the task.
            self._errors[index] = error.with_traceback(None)

    def _break(self, error: BaseException) -> None:
        """The job raised: what it had begun has failed."""
        logger.error("a background transfer broke off: %s", error, exc_info=error)
        failure = as_failure(error)
        open_ends = [i for i, result in enumerate(self._results) if result is None]
        begun = [i for i in open_ends if self._started[i]]
        # A job that broke off between two results has still failed, and must say why.
        for index in begun or open_ends:
            self.fail(index, failure)

    # -- for waiting threads ----------------------------------------------------------------------

    def cancel(self) -> bool:
        """Start nothing more; see :meth:`CacheTask.cancel`."""
        with self._lock:
            if self._sealed:
                return False
            self._cancelled = True
            if self._moving:
                return True
            replace, self._replace = self._replace, None
        self._seal()
        if replace is not None:
            replace()
        return True

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until it is done; whether it is."""
        with self._lock:
            return self._changed.wait_for(lambda: self._done, timeout_s)

    @property
    def done(self) -> bool:
        """Whether nothing more will happen."""
        return self._done

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled before all of it had been done."""
        return self._done and self._cut_short

    @property
    def results(self) -> list[LLMStatusCode | None]:
        """The results so far, a copy."""
        return list(self._results)

    def failure(self) -> LLMException | None:
        """Why it failed, once it is done: the first failed result's error."""
        if not self._done:
            return None
        for error in self._errors:
            if error is not None:
                return error
        return _stopped("before it had started") if None in self._results else None

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call this when done: in the thread that ends the work, or now."""
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
                return
        callback()

    def _seal(self) -> None:
        with self._lock:
            if self._sealed:
                return
            self._cut_short = self._cancelled and None in self._results
            for index, started in enumerate(self._started):
                if started:
                    self.fail(index, _stopped("before all layers were sent"))
            self._sealed = True
        try:
            self._release()
        except Exception:
            logger.exception("giving back what a transfer held failed")
        with self._lock:
            self._done = True
            callbacks, self._callbacks = self._callbacks, []
            # What the job refers to may be large, and the task may be kept for long.
            self._job, self._release = _nothing, lambda: None
            self._changed.notify_all()
        # All of them, also if one raises what a callback must not, such as SystemExit.
        with ExitStack() as rest:
            for callback in reversed(callbacks):
                rest.callback(callback)


class CacheTask:
    """An operation that runs in the background (reference API, 10.4).

    Made by ``transfer_cache_async`` (one result for each config) and by the ``*_async`` forms of
    pulls and pushes (one result). Whatever happens to the transfer is reported here; the methods
    raise nothing for it, only ``await`` does.

    Once the task is done, it reads and writes no memory any more. The local cache cannot lose its
    memory before.

    Thread safety: all methods may be called from any thread, and any number of threads and
    coroutines may wait. ``synchronize`` and ``get_results`` block; in a coroutine use ``await``.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    # -- what the reference has -------------------------------------------------------------------

    def synchronize(self, timeout_in_millis: int | None = None) -> LLMStatusCode:
        """Wait for the end, and say how it went as a whole.

        Args:
            timeout_in_millis: How long to wait, uint32; 0 looks and returns, None waits for as long
                as it takes. A timeout does not stop the task.

        Returns:
            ``LLM_TIMEOUT`` while it still runs. Then the first result that is a failure;
            ``LLM_FAILED`` if none failed but some were never started, because the task was
            cancelled or broke off; else ``LLM_SUCCESS``.

        Raises:
            TypeError: ``timeout_in_millis`` is not an int.
            ValueError: It is outside uint32.
        """
        if not self._wait(timeout_in_millis):
            return LLMStatusCode.LLM_TIMEOUT
        results = self._work.results
        failed = (r for r in results if r is not None and r != LLMStatusCode.LLM_SUCCESS)
        unstarted = LLMStatusCode.LLM_FAILED if None in results else LLMStatusCode.LLM_SUCCESS
        return next(failed, unstarted)

    def get_results(self, timeout_in_millis: int | None = None) -> list[LLMStatusCode | None]:
        """Wait for the end, and say how it went for each config.

        Args:
            timeout_in_millis: As for :meth:`synchronize`.

        Returns:
            One entry per config, in order: ``LLM_TIMEOUT`` for all while the task still runs; then
            its status, or None if nothing of it was started. Configs do not share results, also
            when they name the same peer, and the failure of one does not stop the others.

        Raises:
            TypeError: ``timeout_in_millis`` is not an int.
            ValueError: It is outside uint32.
        """
        if not self._wait(timeout_in_millis):
            return [LLMStatusCode.LLM_TIMEOUT] * len(self._work.results)
        return self._work.results

    def _wait(self, timeout_in_millis: int | None) -> bool:
        if timeout_in_millis is None:
            return self._work.wait(None)
        return self._work.wait(check_uint32("timeout_in_millis", timeout_in_millis) / 1000)

    # -- beyond -----------------------------------------------------------------------------------

    def done(self) -> bool:
        """Whether the task has ended: succeeded, failed or cancelled. Does not block."""
        return self._work.done

    def cancel(self) -> bool:
        """Start nothing more of this task. Does not block.

        A layer that is being sent to a peer is sent to its end; no further one is. A task that is
        queued, or that waits in its synchronizer, is done at once; what the synchronizer says later
        is ignored. Results that stand are kept, a config of which only some layers were sent is
        ``LLM_FAILED``, one of which nothing was sent stays None.

        Returns:
            False if the task is done already, so that there was nothing to cancel.
        """
        return self._work.cancel()

    def cancelled(self) -> bool:
        """Whether the task is done, and ``cancel()`` or ``finalize()`` kept part from starting."""
        return self._work.cancelled

    def exception(self) -> LLMException | None:
        """The error that belongs to the failure :meth:`synchronize` returns. Does not block.

        Returns:
            None while the task runs, and if all of it succeeded.
        """
        return self._work.failure()

    def add_done_callback(self, fn: Callable[[CacheTask], object]) -> None:
        """Call ``fn(task)`` when the task is done.

        It is called in the thread that ends the task (a worker, or the one that cancels); in this
        thread, at once, if the task is done already. What it raises is logged. It should be short:
        the worker does nothing else meanwhile.
        """

        def call() -> None:
            try:
                fn(self)
            except Exception:
                logger.exception("a callback of %r failed", self)

        self._work.when_done(call)

    @property
    def layers_done(self) -> int:
        """Layers that have been dealt with, for every config that wants them."""
        return self._work.layers_done

    @property
    def layers_total(self) -> int:
        """Layers that some config wants; 1 for pulls and pushes."""
        return self._work.layers_total

    def __await__(self) -> Generator[Any, None, LLMStatusCode]:
        """Wait in a coroutine; the event loop goes on meanwhile.

        Cancelling the coroutine does not cancel the task.

        Returns:
            ``LLM_SUCCESS``.

        Raises:
            LLMException: What :meth:`exception` returns, if the task failed or was cancelled.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[None] = loop.create_future()

        def arrive() -> None:
            if not arrived.done():
                arrived.set_result(None)

        def wake() -> None:
            # A loop that was closed meanwhile has nobody left who waits.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(arrive)

        self._work.when_done(wake)
        yield from arrived.__await__()
        failure = self._work.failure()
        if failure is not None:
            raise failure
        return LLMStatusCode.LLM_SUCCESS

    def __repr__(self) -> str:
        state = "done" if self.done() else "running"
        results = ["-" if r is None else r.name for r in self._work.results]
        return f"CacheTask({state}, layers={self.layers_done}/{self.layers_total}, {results})"


def as_failure(error: BaseException) -> LLMException:
    """An error as one with a status: itself, or LLM_UNKNOWN_ERROR with it as the cause."""
    if isinstance(error, LLMException):
        return error
    text = f"{type(error).__name__}: {error}"
    failure = error_for(LLMStatusCode.LLM_UNKNOWN_ERROR, text)
    failure.__cause__ = error
    return failure


def _stopped(when: str) -> LLMException:
    return error_for(LLMStatusCode.LLM_FAILED, f"the transfer was stopped {when}")


def _nothing(_: Work) -> None:
    """The job of work that is done."""
