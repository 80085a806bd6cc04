# SPDX-License-Identifier: Apache-2.0
"""The producer's side: until when the blocks of finished prompts are kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_EARLY = 4096
"""Leases that peers have named and the engine has not."""


def lease_number_now() -> int:
    """The lowest number for a lease that is granted now: microseconds since 1970.

    So that a number from an earlier life of an engine, whose workers may have had the same names
    and addresses, is never one of this life. Below 2**53, for JSON's sake.
    """
    return time.time_ns() // 1000


@dataclass
class _Lease:
    """Blocks that are kept.

    Attributes:
        ends_at: When, if nobody releases it.
        request_id: Whose blocks; None until the engine has said so.
        blocks: Which.
        claimed_by: Peers that are about to read them.
        released_by: Peers that have read them.
        readers: How many will.
    """

    ends_at: float
    request_id: str | None = None
    blocks: tuple[int, ...] = ()
    claimed_by: set[int] = field(default_factory=set)
    released_by: set[int] = field(default_factory=set)
    readers: int = 1


class Leases:
    """Which blocks are kept for peers.

    The engine grants leases by rising numbers, and names them in what it tells the client. A peer
    that reads blocks *claims* the lease first and *releases* it afterwards; if the answer to the
    release is that the lease was still there, the blocks have not been anybody else's meanwhile,
    and what was read is right. So it does not matter how late a peer comes, or how long it slept.

    The engine tells its worker of a lease one step after the client has heard of it. A peer may be
    faster: a number that is higher than all that were granted is an early one.

    Thread safety: all methods may be called from any thread, and don't block.

    Args:
        lease_s: Seconds that a lease lasts, from when it is granted or claimed.
        clock: Seconds, rising.
        after: The number that those of this life are above.
    """

    def __init__(
        self, lease_s: float, clock: Callable[[], float] = time.monotonic, after: int = 0
    ) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        self._highest = after
        self._leases: dict[int, _Lease] = {}
        self._finished: set[str] = set()

    def grant(self, number: int, request_id: str, blocks: tuple[int, ...]) -> None:
        """The engine keeps these blocks from now on."""
        with self._lock:
            self._highest = max(self._highest, number)
            lease = self._leases.setdefault(number, _Lease(0.0))
            lease.request_id, lease.blocks = request_id, blocks
            lease.ends_at = self._clock() + self._lease_s
            self._end_if_released(number, lease)

    def claim(self, number: int, peer: int, readers: int) -> bool:
        """A peer is about to read; whether the lease is there, and lasts a while from now on."""
        with self._lock:
            lease = self._find(number)
            if lease is None:
                return False
            lease.claimed_by.add(peer)
            lease.readers = readers
            lease.ends_at = self._clock() + self._lease_s
            return True

    def release(self, number: int, peer: int) -> bool:
        """A peer has read; whether the lease was there all the time."""
        with self._lock:
            lease = self._find(number)
            if lease is None:
                return False
            lease.released_by.add(peer)
            self._end_if_released(number, lease)
            return True

    def blocks(self, number: int) -> tuple[int, ...] | None:
        """The blocks of a lease; None if it is not there, empty if it is early."""
        with self._lock:
            lease = self._find(number)
            return None if lease is None else lease.blocks

    def peer_gone(self, peer: int) -> None:
        """The link to a peer is lost: what it was reading is released."""
        with self._lock:
            for number, lease in list(self._leases.items()):
                if peer in lease.claimed_by - lease.released_by:
                    lease.released_by.add(peer)
                    self._end_if_released(number, lease)

    def take_finished(self) -> set[str]:
        """Requests whose leases have ended since the last call; their blocks may be freed now."""
        with self._lock:
            now = self._clock()
            for number, lease in list(self._leases.items()):
                # One that is early and has been released waits for the engine to say whose it is.
                known = lease.request_id is not None or not lease.released_by
                if known and lease.ends_at <= now:
                    self._end(number, lease)
            finished, self._finished = self._finished, set()
            return finished

    @property
    def num_held(self) -> int:
        """Leases that are there."""
        return len(self._leases)

    def _find(self, number: int) -> _Lease | None:
        lease = self._leases.get(number)
        if lease is None and self._highest < number and len(self._leases) < MAX_EARLY:
            lease = self._leases[number] = _Lease(self._clock() + self._lease_s)
        return lease

    def _end_if_released(self, number: int, lease: _Lease) -> None:
        # One that is early stays until it has been granted: only then its blocks can be freed.
        if len(lease.released_by) >= lease.readers and lease.request_id is not None:
            self._end(number, lease)

    def _end(self, number: int, lease: _Lease) -> None:
        del self._leases[number]
        if lease.request_id is not None:
            self._finished.add(lease.request_id)
