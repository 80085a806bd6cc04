# SPDX-License-Identifier: Apache-2.0
"""The producer's side: until when the blocks of finished prompts are kept."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from llm_datadist_torch.vllm.params import BlockIds

logger = logging.getLogger("llm_datadist_torch")


@dataclass
class _Lease:
    """Blocks that are kept.

    Attributes:
        request_id: Whose blocks.
        blocks: Which.
        ends_at: When, if nobody claims or releases it.
        claimed_by: Peers that are about to read them.
        released_by: Peers that have read them.
        readers: How many will.
    """

    request_id: str
    blocks: BlockIds
    ends_at: float
    claimed_by: set[int] = field(default_factory=set)
    released_by: set[int] = field(default_factory=set)
    readers: int = 1


class Leases:
    """Which blocks are kept for peers.

    The engine grants leases by rising numbers, and names them in what it tells the client. A peer
    that wants blocks *claims* the lease, again and again while it waits, and *releases* it after it
    has read; if the answer to the release is that the lease was there, the blocks have not been
    anybody else's meanwhile, and what was read is right. So it does not matter how late a peer
    comes, or how long it slept. Numbers count in one life of the engine: whoever names one says
    which life it means, and is not heard if that is another.

    The engine tells its worker of a lease one step after the client has heard of it. A peer may be
    faster: for a number above all that were granted the answer is None, ask again. Of any other
    number that is not there it is that nothing is held.

    Thread safety: all methods may be called from any thread, and don't block.

    Args:
        lease_s: Seconds that a lease lasts from when it was claimed last.
        claim_s: Seconds within which it must be claimed.
        clock: Seconds, rising.
    """

    def __init__(
        self, lease_s: float, claim_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lease_s = lease_s
        self._claim_s = min(claim_s, lease_s)
        self._clock = clock
        self._lock = threading.Lock()
        self._highest = 0
        self._leases: dict[int, _Lease] = {}
        self._finished: set[str] = set()
        self._num_expired = 0

    def grant(self, number: int, request_id: str, blocks: BlockIds) -> None:
        """The engine keeps these blocks from now on."""
        with self._lock:
            self._highest = max(self._highest, number)
            self._leases[number] = _Lease(request_id, blocks, self._clock() + self._claim_s)

    def claim(self, numbers: Iterable[int], peer: int, readers: int) -> tuple[bool | None, ...]:
        """A peer will read; whether each lease is there, and lasts a while from now on."""
        with self._lock:
            return tuple(self._claim(number, peer, readers) for number in numbers)

    def release(self, number: int, peer: int, readers: int) -> bool | None:
        """A peer has read; whether the lease was there all the time."""
        with self._lock:
            lease = self._leases.get(number)
            if lease is None:
                return self._unknown(number)
            lease.readers = readers
            lease.released_by.add(peer)
            self._end_if_released(number, lease)
            return True

    def still_valid(self, number: int) -> bool:
        """Whether a lease is there."""
        return number in self._leases

    def peer_gone(self, peer: int) -> None:
        """The link to a peer is lost: what it was reading is released."""
        with self._lock:
            for number, lease in list(self._leases.items()):
                if peer in lease.claimed_by - lease.released_by:
                    lease.released_by.add(peer)
                    self._end_if_released(number, lease)

    def end_all(self, reason: str) -> None:
        """Nothing is kept any more: peers that have read hear that what they read may be wrong."""
        with self._lock:
            if self._leases:
                logger.warning("%d leases end: %s", len(self._leases), reason)
            for number, lease in list(self._leases.items()):
                self._end(number, lease)

    def take_finished(self) -> set[str]:
        """Requests whose leases have ended since the last call; their blocks may be freed now."""
        with self._lock:
            now = self._clock()
            for number, lease in list(self._leases.items()):
                if lease.ends_at <= now:
                    self._expire(number, lease)
            finished, self._finished = self._finished, set()
            return finished

    def take_num_expired(self) -> int:
        """Leases that have ended by time since the last call."""
        with self._lock:
            count, self._num_expired = self._num_expired, 0
            return count

    @property
    def num_held(self) -> int:
        """Leases that are there."""
        return len(self._leases)

    # -- with the lock held -----------------------------------------------------------------------

    def _unknown(self, number: int) -> bool | None:
        return None if number > self._highest else False

    def _claim(self, number: int, peer: int, readers: int) -> bool | None:
        lease = self._leases.get(number)
        if lease is None:
            return self._unknown(number)
        lease.claimed_by.add(peer)
        lease.readers = readers
        lease.ends_at = self._clock() + self._lease_s
        return True

    def _end_if_released(self, number: int, lease: _Lease) -> None:
        if len(lease.released_by) >= lease.readers:
            self._end(number, lease)

    def _expire(self, number: int, lease: _Lease) -> None:
        if lease.claimed_by:
            why = (
                f"consumers {sorted(lease.claimed_by)} have not read them within {self._lease_s} s"
            )
        else:
            why = f"nobody has claimed them within {self._claim_s} s"
        logger.warning("the blocks of request %s are given up: %s", lease.request_id, why)
        self._num_expired += 1
        self._end(number, lease)

    def _end(self, number: int, lease: _Lease) -> None:
        del self._leases[number]
        self._finished.add(lease.request_id)
