# SPDX-License-Identifier: Apache-2.0
"""The leases that we hold on a peer's caches: each goes back, whatever interrupts its holder."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

from llm_datadist_torch.links.messages import Release
from llm_datadist_torch.net.timers import Timers

SWEEP_S = 1.0
"""How often it is looked for leases whose holders were interrupted."""


class Holder:
    """Whoever asks for a lease, from before it is asked for until it has been given back.

    Ctrl-C may come between any two steps of an asker. So the lease is noted here by the endpoint's
    thread, which nothing interrupts, and goes back when the holder says so or is no more.

    Attributes:
        lease_id: The lease; 0 before there is one.
        over: It is not needed any more.
    """

    __slots__ = ("__weakref__", "lease_id", "over")

    def __init__(self) -> None:
        self.lease_id = 0
        self.over = False


class HeldLeases:
    """Those of one link.

    Thread safety: ``give_back`` may be called from any thread, the rest belongs to the endpoint's.
    """

    def __init__(self) -> None:
        self._holders: dict[int, weakref.ref[Holder]] = {}
        self._sweeping = False

    def note(
        self,
        lease_id: int,
        held: weakref.ref[Holder] | None,
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
        holder = None if held is None else held()
        if held is None or holder is None or holder.over:
            return False
        holder.lease_id = lease_id
        self._holders[lease_id] = held
        if not self._sweeping:
            self._sweep_later(post, timers)
        return True

    def give_back(
        self, holder: Holder, fetched: tuple[int, int] | None, post: Callable[[Release], None]
    ) -> None:
        """Give back a lease, if there is one.

        Args:
            holder: Whose it is; it is ``over``, so that a lease that is still to come goes back.
            fetched: See :class:`Release`.
            post: Sends the message.
        """
        if holder.lease_id:
            post(Release(holder.lease_id, fetched))
            self._holders.pop(holder.lease_id, None)

    def _sweep(self, post: Callable[[Release], None], timers: Timers) -> None:
        """Give back the leases of those who were interrupted before they could."""
        self._sweeping = False
        for lease_id, held in list(self._holders.items()):
            holder = held()
            if holder is None or holder.over:
                self._holders.pop(lease_id, None)
                # One that has gone back in this moment is not there any more: nothing happens.
                post(Release(lease_id, None))
        if self._holders:
            self._sweep_later(post, timers)

    def _sweep_later(self, post: Callable[[Release], None], timers: Timers) -> None:
        self._sweeping = True
        timers.set(lambda: self._sweep(post, timers), [time.monotonic() + SWEEP_S])
