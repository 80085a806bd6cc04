# SPDX-License-Identifier: Apache-2.0
"""Threads for calls that block, so that waiting for one peer delays no other."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

logger = logging.getLogger("llm_datadist_torch")

IDLE_S = 5.0
"""Seconds after which a thread without work ends."""
MAX_THREADS = 512


@dataclass(eq=False)
class _Job:
    lane: Hashable
    run: Callable[[], None]
    begun: bool = False
    dropped: bool = False


@dataclass
class _Lane:
    running: int = 0
    waiting: deque[_Job] = field(default_factory=deque)


class Lanes:
    """Runs jobs, at most ``width`` of each lane at a time, in order of arrival.

    A lane is one peer, so a peer that does not answer holds up nobody else's jobs. A job that waits
    for its turn has a deadline of its own. Threads are started when they are needed and end when
    they are not, and never by the caller of :meth:`submit`: a free one always waits for work.

    Thread safety: all methods may be called from any thread; only ``close`` blocks.

    Args:
        name: What its threads are called.
        width: Jobs of a lane that run at a time.
    """

    def __init__(self, name: str, width: int) -> None:
        self._name = name
        self._width = width
        self._changed = threading.Condition()
        self._lanes: dict[Hashable, _Lane] = {}
        self._ready: deque[_Job] = deque()
        self._running = self._threads = self._idle = 0
        self._closed = False
        self._timed = threading.Condition()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._start(self._keep_time, "timer")
        with self._changed:
            self._grow()

    def submit(
        self,
        lane: Hashable,
        job: Callable[[], None],
        *,
        within_s: float | None = None,
        expired: Callable[[], None] = lambda: None,
    ) -> None:
        """Run a job soon.

        Args:
            lane: Whose turn it takes.
            job: What to do; what it raises is logged.
            within_s: Seconds after which it need not begin any more; None: it waits.
            expired: Called in that case, in place of the job; must not block. After :meth:`close`
                neither is called.
        """
        entry = _Job(lane, job)
        with self._changed:
            if self._closed:
                return
            each = self._lanes.setdefault(lane, _Lane())
            if each.running < self._width:
                each.running += 1
                self._ready.append(entry)
                self._changed.notify()
            else:
                each.waiting.append(entry)
        if within_s is not None:
            self._at(time.monotonic() + within_s, lambda: self._expire(entry, expired))

    def later(self, seconds: float, lane: Hashable, job: Callable[[], None]) -> None:
        """Run a job after a while."""
        self._at(time.monotonic() + seconds, lambda: self.submit(lane, job))

    def close(self, timeout_s: float) -> None:
        """Begin nothing more, and wait for what runs. Idempotent."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._lanes.clear()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running, timeout_s)
        with self._timed:
            self._timers.clear()
            self._timed.notify_all()

    @property
    def num_threads(self) -> int:
        """Threads that run jobs or wait for some."""
        return self._threads

    # -- time -------------------------------------------------------------------------------------

    def _at(self, when: float, call: Callable[[], None]) -> None:
        with self._timed:
            heapq.heappush(self._timers, (when, next(self._numbers), call))
            if self._timers[0][2] is call:
                self._timed.notify()

    def _keep_time(self) -> None:
        while not self._closed:
            with self._timed:
                wait = self._timers[0][0] - time.monotonic() if self._timers else None
                if wait is None or wait > 0:
                    self._timed.wait(wait)
                    continue
                _, _, call = heapq.heappop(self._timers)
            call()

    def _expire(self, job: _Job, expired: Callable[[], None]) -> None:
        with self._changed:
            if job.begun or self._closed:
                return
            job.dropped = True
        expired()

    # -- threads ----------------------------------------------------------------------------------

    def _start(self, target: Callable[[], None], name: str) -> None:
        threading.Thread(target=target, name=f"llmdd-{self._name}-{name}", daemon=True).start()

    def _grow(self) -> None:
        """With the lock held: see that a free thread waits for the next job."""
        if self._idle or self._closed or self._threads >= MAX_THREADS:
            return
        self._threads += 1
        self._idle += 1
        try:
            self._start(self._work, str(next(self._numbers)))
        except RuntimeError:
            # The interpreter exits.
            self._threads -= 1
            self._idle -= 1

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.run()
            except Exception:
                logger.exception("a job of the connector broke off")
            self._done(job)

    def _next(self) -> _Job | None:
        with self._changed:
            while True:
                while not self._ready and not self._closed:
                    if not self._changed.wait(IDLE_S) and self._idle > 1 and not self._ready:
                        self._idle -= 1
                        self._threads -= 1
                        return None
                if self._closed:
                    self._threads -= 1
                    return None
                job = self._ready.popleft()
                if job.dropped:
                    self._advance(job.lane)
                    continue
                job.begun = True
                self._running += 1
                self._idle -= 1
                self._grow()
                return job

    def _done(self, job: _Job) -> None:
        with self._changed:
            self._running -= 1
            self._idle += 1
            self._advance(job.lane)
            if self._closed:
                self._changed.notify_all()

    def _advance(self, lane: Hashable) -> None:
        """With the lock held: a job of this lane has ended, the next may begin."""
        each = self._lanes.get(lane)
        if each is None:
            return
        while each.waiting:
            job = each.waiting.popleft()
            if not job.dropped:
                self._ready.append(job)
                self._changed.notify()
                return
        each.running -= 1
        if not each.running:
            del self._lanes[lane]
