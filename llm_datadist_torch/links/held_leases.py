# SPDX-License-Identifier: Apache-2.0
"""The leases that we hold on a peer's caches: each goes back, whatever interrupts its holder."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

from llm_datadist_torch.net.timers import Timers
from llm_datadist_torch.serving.messages import Release

SWEEP_S = 1.0
"""How often it is looked for leases whose holders were interrupted."""


class LeaseTicket:
    """Whoever asks for a lease, from before it is asked for until it has been given back.

    Ctrl-C may come between any two steps of an asker. So the lease is noted here by the endpoint's
    thread, which nothing interrupts, and goes back when the holder says so or is no more.

    Attributes:
        lease_id: The lease; 0 before there is one.
        closed: It is not needed any more.
    """

    __slots__ = ("__weakref__", "closed", "lease_id")

    def __init__(self) -> None:
        self.lease_id = 0
        self.closed = False


class HeldLeases:
    """Those of one link.

    Thread safety: ``give_back`` may be called from any thread, the rest belongs to the endpoint's.
    """

    def __init__(self) -> None:
        self._tickets: dict[int, weakref.ref[LeaseTicket]] = {}
        self._sweeping = False

    def note(
        self,
        lease_id: int,
        held: weakref.ref[LeaseTicket] | None,
        post: Callable[[Release], None],
        timers: Timers,
    ) -> bool:
        """A lease has come.

        Args:
            lease_id: Which.
            held: For whom; None if nobody waits for it any more.
            post: Sends the message that gives it back; must not block.
            timers: Of the endpoint's thread.

        Returns:
            Whether somebody has it now. Else it has to go back.
        """
        ticket = None if held is None else held()
        if held is None or ticket is None or ticket.closed:
            return False
        ticket.lease_id = lease_id
        self._tickets[lease_id] = held
        if not self._sweeping:
            self._sweep_later(post, timers)
        return True

    def give_back(
        self, ticket: LeaseTicket, fetched: tuple[int, int] | None, post: Callable[[Release], None]
    ) -> None:
        """Give back a lease, if there is one.

        Args:
            ticket: Whose it is; it is ``closed``, so that a lease that is still to come goes back.
            fetched: See :class:`Release`.
            post: Sends the message.
        """
        if ticket.lease_id:
            post(Release(ticket.lease_id, fetched))
            self._tickets.pop(ticket.lease_id, None)

    def _sweep(self, post: Callable[[Release], None], timers: Timers) -> None:
        """Give back the leases of those who were interrupted before they could."""
        self._sweeping = False
        for lease_id, held in list(self._tickets.items()):
            ticket = held()
            if ticket is None or ticket.closed:
                self._tickets.pop(lease_id, None)
                # One that has gone back in this moment is not there any more: nothing happens.
                post(Release(lease_id, None))
        if self._tickets:
            self._sweep_later(post, timers)

    def _sweep_later(self, post: Callable[[Release], None], timers: Timers) -> None:
        self._sweeping = True
        timers.set(lambda: self._sweep(post, timers), [time.monotonic() + SWEEP_S])
