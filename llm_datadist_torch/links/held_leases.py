# SPDX-License-Identifier: Apache-2.0
"""This side's leases on a peer's caches; each is given back, also after an interrupt."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from llm_datadist_torch.serving.messages import Release

SWEEP_S = 1.0
"""How often leases of interrupted threads are looked for."""


class LeaseTicket:
    """Client side of one lease; the lease is given back when this is closed or collected.

    Ctrl-C may come between any two steps of the requesting thread. So the I/O thread, which nothing
    interrupts, notes the lease here.

    Attributes:
        lease_id: The lease; 0 before there is one.
        closed: It is not needed any more.
    """

    __slots__ = ("__weakref__", "closed", "lease_id")

    def __init__(self) -> None:
        self.lease_id = 0
        self.closed = False


class HeldLeases:
    """The leases of this side on one link.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._tickets: dict[int, weakref.ref[LeaseTicket]] = {}

    def note(self, lease_id: int, held: weakref.ref[LeaseTicket] | None) -> bool:
        """Note a lease that has arrived.

        Args:
            lease_id: Its id.
            held: The ticket that it belongs to; None if no thread waits for it any more.

        Returns:
            Whether a ticket has it now. Otherwise the caller must give it back.
        """
        if lease_id in self._tickets:
            # The answer was dealt with twice: its thread took very long, but was not interrupted.
            return True
        ticket = None if held is None else held()
        if held is None or ticket is None or ticket.closed:
            return False
        # In this order: what an interrupt leaves in the table, the next sweep gives back.
        self._tickets[lease_id] = held
        ticket.lease_id = lease_id
        return True

    def give_back(
        self, ticket: LeaseTicket, fetched: tuple[int, int] | None, post: Callable[[Release], None]
    ) -> None:
        """Give back a lease, if there is one.

        Args:
            ticket: The ticket; it is ``closed``, so that a lease that arrives later is given back.
            fetched: See :class:`Release`.
            post: Sends the message.
        """
        if ticket.lease_id:
            post(Release(ticket.lease_id, fetched))
            self._tickets.pop(ticket.lease_id, None)

    @property
    def any(self) -> bool:
        """Whether there are leases."""
        return bool(self._tickets)

    def in_use(self) -> list[int]:
        """Those that somebody still works with; on a link that has ended, no more are added."""
        tickets = [(lease_id, held()) for lease_id, held in list(self._tickets.items())]
        return [number for number, ticket in tickets if ticket is not None and not ticket.closed]

    def sweep(self, post: Callable[[Release], None]) -> None:
        """Give back the leases of threads that were interrupted before they could."""
        for lease_id, held in list(self._tickets.items()):
            ticket = held()
            if ticket is None or ticket.closed:
                self._tickets.pop(lease_id, None)
                # One that has gone back in this moment is not there any more: nothing happens.
                post(Release(lease_id, None))
