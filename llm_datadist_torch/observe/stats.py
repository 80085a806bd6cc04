# SPDX-License-Identifier: Apache-2.0
"""``Stats``: what ``LLMDataDist.stats()`` returns. Plain values, which go through JSON and back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from llm_datadist_torch.observe.transfers import TransferCounter, TransferRecord


@dataclass(frozen=True)
class CacheStats:
    """One cache that is alive.

    Attributes:
        cache_id: Its id.
        names: Its keys, as text: those of the reference API, or ``BlocksKey(name='kv')`` where the
            front door has named the cache.
        paged: Blocks cache or contiguous.
        tensors: Number of tensors.
        rows: Blocks or rows of each.
        nbytes: Bytes of all tensors together, without padding.
        device: Where it lies.
        registered: Whether its memory is the caller's.
        leases: Uses that are under way.
        dropped: Whether the program has dropped its ``Cache``; it stays, because peers may name it.
        pool: Which pool it lies in: "device", "host", or "" for none.
        spans: Where its tensors lie in the pool: pairs of offset and bytes.
    """

    cache_id: int
    names: tuple[str, ...]
    paged: bool
    tensors: int
    rows: int
    nbytes: int
    device: str
    registered: bool
    leases: int
    dropped: bool
    pool: str = ""
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class PoolStats:
    """One pool.

    Attributes:
        name: "device" or "host".
        total_bytes: Bytes in whole pages.
        free_bytes: Bytes in free pages.
        largest_free_bytes: The largest tensor that would fit now.
    """

    name: str
    total_bytes: int
    free_bytes: int
    largest_free_bytes: int


@dataclass(frozen=True)
class LinkStats:
    """One link.

    Attributes:
        peer: The peer's cluster id.
        state: "linked" or "lost".
        since: When it came into this state, as ``time.time()`` has it.
        transports: Kind of memory -> transport, "" for none.
        reason: Why it was lost.
    """

    peer: int
    state: str
    since: float
    transports: dict[str, str]
    reason: str


@dataclass(frozen=True)
class QuarantineStats:
    """Memory that peers may still write to by links that have ended, and that nobody else gets.

    A peer on this host that lost its connection may go on writing. Its leases end when it says so
    on the next link, or when its process ends.

    Attributes:
        leases: Leases of such peers.
        caches: Caches that they are on; some may have been freed by the program.
        nbytes: Bytes of those caches.
    """

    leases: int = 0
    caches: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class ErrorStats:
    """Transfers that failed in one way.

    Attributes:
        operation: Such as "pull_blocks".
        peer: The peer's cluster id.
        status: Name of the status code.
        count: How many.
    """

    operation: str
    peer: int
    status: str
    count: int


@dataclass(frozen=True)
class Stats:
    """An instance as it is, and what its transfers have done since ``init``.

    Only transfers that this instance asked for count here; what peers pull from it and push to it
    is in theirs.

    Attributes:
        cluster_id: Its id.
        device: What ``Placement.DEVICE`` means.
        listen: Where it listens, "" for nowhere.
        time: When this was looked at, as ``time.time()`` has it.
        monotonic_ns: The same on the monotonic clock, which ``recent`` has.
        caches: Caches that are alive.
        pools: Pools.
        links: Links, lost ones too.
        transfers: Counters of transfers that moved their bytes.
        errors: Counters of those that failed.
        recent: The latest transfers, the oldest first.
        quarantine: What peers that can't be heard any more may still write to.
    """

    cluster_id: int
    device: str
    listen: str
    time: float
    monotonic_ns: int
    caches: tuple[CacheStats, ...]
    pools: tuple[PoolStats, ...]
    links: tuple[LinkStats, ...]
    transfers: tuple[TransferCounter, ...]
    errors: tuple[ErrorStats, ...]
    recent: tuple[TransferRecord, ...]
    quarantine: QuarantineStats = QuarantineStats()

    def to_json(self) -> str:
        """Write it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Stats:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: It is something else.
        """
        value = json.loads(text)
        for cache in value["caches"]:
            cache["names"] = tuple(cache["names"])
            cache["spans"] = tuple((int(at), int(size)) for at, size in cache["spans"])
        for counter in value["transfers"]:
            counter["buckets"] = tuple(counter["buckets"])
        parts: dict[str, type] = {
            "caches": CacheStats, "pools": PoolStats, "links": LinkStats,
            "transfers": TransferCounter, "errors": ErrorStats,
        }  # fmt: skip
        for name, kind in parts.items():
            value[name] = tuple(kind(**each) for each in value[name])
        value["quarantine"] = QuarantineStats(**value["quarantine"])
        value["recent"] = tuple(TransferRecord(*each) for each in value["recent"])
        return cls(**value)

    def quantile_us(self, peer: int, share: float) -> float:
        """How long ``share`` of the latest transfers with a peer took at most, in microseconds.

        0.0 where there were none.
        """
        times = sorted(each.took_ns for each in self.recent if each.peer == peer)
        return times[min(int(share * len(times)), len(times) - 1)] / 1000 if times else 0.0
