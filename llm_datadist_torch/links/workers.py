# SPDX-License-Identifier: Apache-2.0
"""A bounded pool of daemon threads that do an instance's background work."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable

from llm_datadist_torch.links.work import Work
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMStatusCode, error_for

IDLE_S = 5.0
"""Seconds after which a thread without work ends."""

_JOIN_MS = 2_000


class WorkerPool:
    """Runs work in order of arrival, at most ``limit`` pieces at a time.

    Threads start when there is work for them, and end when there has been none for a while. A
    thread whose work was cancelled in a wait that never ends (in a user's synchronizer) no longer
    counts: another takes its place, and it ends when its wait does, if ever. All are daemons, so
    that none keeps the interpreter from exiting.

    Thread safety: all methods may be called from any thread, also from the work itself.

    Args:
        name: What its threads are called.
        limit: Most pieces of work that run at a time.
        on_start: Called first in each thread; must not raise.
        keep: Threads that are started at once and kept, for callers for which even the start of a
            thread takes too long.
    """

    def __init__(
        self,
        name: str,
        limit: int,
        on_start: Callable[[], None] = lambda: None,
        *,
        keep: int = 0,
    ) -> None:
        self._name = name
        self._limit = limit
        self._on_start = on_start
        # Taken as a lock, not as the condition: Ctrl-C must not come between taking it and the
        # block that releases it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._queue: deque[Work] = deque()
        self._running: set[Work] = set()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False
        self._numbers = itertools.count()
        self._keep = keep
        with self._lock:
            for _ in range(keep):
                self._grow()

    def submit(self, work: Work) -> None:
        """Queue work. Does not block.

        Raises:
            LLMException: LLM_FAILED: the pool is closed, or the interpreter exits and starts no
                threads. The work has been cancelled.
        """
        with self._lock:
            refused = self._closed or not self._enqueue(work)
        if refused:
            work.cancel()
            raise error_for(
                LLMStatusCode.LLM_FAILED,
                "no background work can be started any more: the instance has been finalized, or"
                " the interpreter exits",
            )

    def close(self, deadline: Deadline) -> None:
        """Cancel everything, and wait for work that moves bytes, at most until the deadline.

        Work that waits for a synchronizer is not waited for. Idempotent.
        """
        with self._lock:
            self._closed = True
            work = [*self._queue, *self._running]
        # Nothing leaves the queue before it is cancelled: this may be interrupted and called again.
        for each in work:
            each.cancel()
        with self._lock:
            self._queue.clear()
            self._changed.notify_all()
        for each in work:
            each.wait(deadline.remaining_s())
        # Only threads that are about to end are left; a user's callback may still keep one.
        joined = Deadline.after_ms(_JOIN_MS)
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(joined.remaining_s())

    @property
    def num_threads(self) -> int:
        """Threads that do work or wait for some."""
        return len(self._threads)

    # -- with the lock held -----------------------------------------------------------------------

    def _enqueue(self, work: Work) -> bool:
        self._queue.append(work)
        if self._idle >= len(self._queue):
            self._changed.notify()
        elif not self._grow():
            self._queue.pop()
            return False
        return True

    def _grow(self) -> bool:
        """Start a thread if there may be one more; False if there is none at all to do the work."""
        if len(self._threads) >= self._limit:
            return True
        name = f"llmdd-{self._name}-{next(self._numbers)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
        return bool(self._threads)

    # -- the threads ------------------------------------------------------------------------------

    def _work(self) -> None:
        thread = threading.current_thread()
        try:
            self._on_start()
            mine = True
            while mine and (work := self._next()) is not None:
                mine = work.run(lambda: self._replace(thread))
                with self._lock:
                    self._running.discard(work)
        finally:
            # Also when a callback ends the thread, by SystemExit.
            with self._lock:
                self._threads.discard(thread)

    def _next(self) -> Work | None:
        with self._lock:
            self._idle += 1
            while not self._changed.wait_for(lambda: self._queue or self._closed, IDLE_S):
                if len(self._threads) > self._keep:
                    break
            self._idle -= 1
            if not self._queue or self._closed:
                # From here on nobody counts on this thread.
                self._threads.discard(threading.current_thread())
                return None
            work = self._queue.popleft()
            self._running.add(work)
            return work

    def _replace(self, thread: threading.Thread) -> None:
        """This thread's work was cancelled where it hangs."""
        with self._lock:
            self._threads.discard(thread)
            if self._queue and not self._closed:
                self._grow()
