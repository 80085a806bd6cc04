# SPDX-License-Identifier: Apache-2.0
"""One movement at a time, for engines that can't end one without ending others with it."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress

from llm_datadist_torch.values.deadline import Deadline

_PAUSE_S = 0.0002


class Turns:
    """Lets movements through one at a time, in the order in which they came.

    Each holds a lock of its own for as long as it waits and runs::

        ticket = threading.Lock()
        with ticket:
            if not turns.wait(ticket, deadline):
                raise timed_out(deadline)
            ...

    The interpreter takes and releases the lock of a ``with`` statement in one step, so that Ctrl-C,
    wherever it comes, leaves nothing that others wait for.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._queue: deque[threading.Lock] = deque()

    def wait(self, ticket: threading.Lock, deadline: Deadline) -> bool:
        """Wait until the movements that came before have ended, at most until the deadline.

        Args:
            ticket: A lock that the caller has just made, and holds.
            deadline: By when.

        Returns:
            Whether it is the caller's turn, which ends when ``ticket`` is released.
        """
        self._queue.append(ticket)
        while self._first() is not ticket:
            if deadline.expired:
                return False
            time.sleep(_PAUSE_S)
        return True

    def _first(self) -> threading.Lock | None:
        for ticket in tuple(self._queue):
            if ticket.locked():
                return ticket
            with suppress(ValueError):
                self._queue.remove(ticket)  # another thread may have been faster
        return None
