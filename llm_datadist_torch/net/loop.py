# SPDX-License-Identifier: Apache-2.0
"""The I/O thread of one instance: it waits for descriptors, timers and calls of other threads."""

from __future__ import annotations

import collections
import errno
import logging
import os
import select
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

from llm_datadist_torch import _C
from llm_datadist_torch.net.timers import Timers

logger = logging.getLogger("llm_datadist_torch")

READ, WRITE, BROKEN = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR

_CALL_S = 5.0
"""Longest that :meth:`Loop.call` waits for the thread."""

_T = TypeVar("_T")


class Loop:
    """One thread that calls back when descriptors are ready.

    Thread safety: ``submit``, ``call`` and ``watch_for`` may be called from any thread; ``add``,
    ``remove`` and the timers belong to the loop's thread (before ``start``, to its maker).

    Attributes:
        timers: What the thread does at certain times.
    """

    def __init__(self) -> None:
        self.timers = Timers()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._lock = threading.Lock()
        self._running = True
        self._on_start: Callable[[], None] = lambda: None
        self._on_end: Callable[[], None] = lambda: None
        self._epoll = select.epoll()
        try:
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:
            self._epoll.close()
            raise
        self._thread = threading.Thread(
            target=self._run, name="llm_datadist_torch.links", daemon=True
        )
        self.add(self._wake, READ, self._carry_out)

    def start(self, on_start: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Start the thread.

        Args:
            on_start: Called first in the thread; must not raise.
            on_end: Called last in the thread.
        """
        self._on_start, self._on_end = on_start, on_end
        self._thread.start()

    @property
    def in_thread(self) -> bool:
        """Whether the caller is the loop's thread."""
        return threading.get_ident() == self._thread.ident

    @property
    def started(self) -> bool:
        """Whether the thread runs, or has run."""
        return self._thread.ident is not None

    # -- descriptors ------------------------------------------------------------------------------

    def add(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None:
        """Call back, with the events, whenever one of them is there."""
        self._callbacks[descriptor] = callback
        self._epoll.register(descriptor, events)

    def watch_for(self, descriptor: int, events: int) -> None:
        """Wait for these events of a descriptor from now on, also if the thread waits already."""
        self._epoll.modify(descriptor, events)

    def stream(self, descriptor: int, events: int) -> _C.StreamSocket:
        """A descriptor that has been added, with what else is done at its socket."""
        return _C.StreamSocket(self._epoll.fileno(), descriptor, events)

    def remove(self, descriptor: int) -> None:
        """No more. To be called before the descriptor is closed."""
        if self._callbacks.pop(descriptor, None) is not None and not self._epoll.closed:
            self._epoll.unregister(descriptor)

    # -- calls of other threads -------------------------------------------------------------------

    def submit(self, call: Callable[[], None]) -> bool:
        """Have this called by the thread, in order; whether it will be. Does not block."""
        # Under a lock, because the number of a closed descriptor soon belongs to somebody else.
        with self._lock:
            if self._wake >= 0:
                self._calls.append(call)
                os.eventfd_write(self._wake, 1)
            return self._wake >= 0

    def run(self, call: Callable[[], None]) -> None:
        """Have this called by the thread: at once if it is the caller, else as ``submit``."""
        if self.in_thread:
            call()
        else:
            self.submit(call)

    def call(self, work: Callable[[], _T]) -> _T:
        """Have this called by the thread, and wait for what it returns or raises.

        Raises:
            OSError: The instance is being finalized, or has been.
        """
        done: Future[_T] = Future()

        def carry_out() -> None:
            try:
                done.set_result(work())
            except Exception as error:  # noqa: BLE001 (the caller gets it, whatever it is)
                done.set_exception(error)

        if not self.submit(carry_out):
            raise OSError(errno.ESHUTDOWN, "the instance has been finalized")
        # A call that close() came before is never carried out.
        wait([done], _CALL_S)
        if not done.done():
            raise OSError(errno.ETIMEDOUT, "the instance is being finalized")
        return done.result()

    def close(self) -> None:
        """End the thread, and wait for it. Idempotent."""
        if self._thread.is_alive():
            self.submit(self._stop)
            self._thread.join()
        elif self._running:
            self._stop()
            self._release()

    def forget(self) -> None:
        """Close the descriptors in a forked child, which has no thread and no right to them."""
        self._running = False
        # A thread that is not here may have held the old one.
        self._lock = threading.Lock()
        self._release_descriptors()

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        self._on_start()
        while self._running:
            timeout = self.timers.wait_s()
            for descriptor, events in self._epoll.poll(timeout):
                callback = self._callbacks.get(descriptor)
                # A descriptor that an earlier callback of this round has closed is not listed.
                if callback is not None:
                    self._guarded(callback, events)
            self.timers.run_due()
        self._release()

    @staticmethod
    def _guarded(callback: Callable[[int], None], events: int) -> None:
        try:
            callback(events)
        except Exception:
            # One bad message or peer must not take the others' links down.
            logger.exception("error in the link thread")

    def _carry_out(self, _events: int) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        for _ in range(len(self._calls)):
            self._guarded(lambda _: self._calls.popleft()(), 0)

    def _stop(self) -> None:
        self._running = False

    def _release(self) -> None:
        self._on_end()
        self._release_descriptors()

    def _release_descriptors(self) -> None:
        with self._lock:
            wake, self._wake = self._wake, -1
            self._calls.clear()
            if wake >= 0:
                os.close(wake)
                self._epoll.close()
