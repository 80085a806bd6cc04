# SPDX-License-Identifier: Apache-2.0
"""What other threads want the endpoint's thread to do."""

from __future__ import annotations

import collections
import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

_COMMAND_S = 5.0
"""Longest that a command waits for the thread."""

_T = TypeVar("_T")


class Commands:
    """A queue of calls, and a descriptor that can be read when there are some.

    Thread safety: ``submit`` and ``call`` may be called from any thread; ``carry_out`` and
    ``close`` belong to the one thread that carries them out.

    Attributes:
        descriptor: An eventfd; -1 once it is closed.
    """

    def __init__(self) -> None:
        self._queue: collections.deque[Callable[[], None]] = collections.deque()
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()

    def submit(self, command: Callable[[], None]) -> bool:
        """Have this done, in order; whether anybody will. Does not block."""
        # Under a lock, because the number of a closed descriptor soon belongs to somebody else.
        with self._lock:
            if self.descriptor >= 0:
                self._queue.append(command)
                os.eventfd_write(self.descriptor, 1)
            return self.descriptor >= 0

    def call(self, work: Callable[[], _T]) -> _T:
        """Have this done, and wait for what it returns or raises.

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
        # A command that close() came before is never carried out.
        wait([done], _COMMAND_S)
        if not done.done():
            raise OSError(errno.ETIMEDOUT, "the instance is being finalized")
        return done.result()

    def carry_out(self) -> None:
        """Do what is in the queue."""
        os.eventfd_read(self.descriptor)
        try:
            while self._queue:
                self._queue.popleft()()
        finally:
            if self._queue:
                os.eventfd_write(self.descriptor, 1)

    def close(self) -> None:
        """Forget what is in the queue, and take no more. Idempotent."""
        with self._lock:
            descriptor, self.descriptor = self.descriptor, -1
            self._queue.clear()
            if descriptor >= 0:
                os.close(descriptor)
