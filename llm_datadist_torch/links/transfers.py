# SPDX-License-Identifier: Apache-2.0
"""Who moves bytes on a link, so that the end of the link can wait for them."""

from __future__ import annotations

import threading
import time

from llm_datadist_torch.values.deadline import Deadline

_RETRY_S = 0.001


class LinkTransfers:
    """The transfers that this side runs on one link, side by side, and what stops them.

    A transfer holds a lock of its own, its ticket, for as long as it runs::

        ticket = threading.Lock()
        with ticket:
            transfers.running.add(ticket)
            if not transfers.stopped:
                ...

    The interpreter takes and releases the lock of a ``with`` statement in one step, so a transfer
    that was interrupted (Ctrl-C) at any point does not count as running. A released ticket
    that is left in ``running`` means nothing. To stop transfers, a thread does the same with
    a ticket in ``stopping``: then no transfer starts, and running ones are waited for.

    Thread safety: all members may be used from any thread.

    Attributes:
        running: Tickets of transfers.
        stopping: Tickets of threads that stop transfers.
    """

    def __init__(self) -> None:
        self.running: set[threading.Lock] = set()
        self.stopping: set[threading.Lock] = set()

    @property
    def stopped(self) -> bool:
        """Whether no transfer may start now."""
        return bool(self.stopping) and _any_locked(self.stopping)

    @property
    def idle(self) -> bool:
        """Whether no transfer runs now."""
        return not _any_locked(self.running)

    def stop(self, ticket: threading.Lock, deadline: Deadline) -> bool:
        """Let no transfer start while ``ticket``, which the caller holds, is locked.

        Blocks until those that run have ended, at most until the deadline.

        Returns:
            Whether they have.
        """
        while not self.try_stop(ticket):
            if deadline.expired:
                return False
            time.sleep(_RETRY_S)
        return True

    def try_stop(self, ticket: threading.Lock) -> bool:
        """As :meth:`stop`, without waiting for those that run."""
        self.stopping.add(ticket)
        return self.idle

    def wait_until_allowed(self, deadline: Deadline) -> bool:
        """Wait until transfers may start again; whether they may."""
        while self.stopped:
            if deadline.expired:
                return False
            time.sleep(_RETRY_S)
        return True

    def wait_until_idle(self) -> None:
        """Wait until no transfer runs, for as long as it takes."""
        while not self.idle:
            time.sleep(_RETRY_S)


def _any_locked(tickets: set[threading.Lock]) -> bool:
    """Whether one of them is locked; released ones are forgotten, for nobody locks them again."""
    # A copy, because other threads add theirs meanwhile.
    for ticket in tuple(tickets):
        if ticket.locked():
            return True
        tickets.discard(ticket)
    return False
