# SPDX-License-Identifier: Apache-2.0
"""Counts the transfers of one instance, and remembers the latest."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

RECENT = 1024
"""Transfers that are remembered one by one."""

NUM_BUCKETS = 32
"""Bucket k counts transfers that took less than 2**k microseconds, and not less than half of that;
the last bucket also counts all longer ones."""


class TransferRecord(NamedTuple):
    """One transfer that has moved its bytes.

    Attributes:
        operation: Such as "pull_blocks".
        peer: The peer's cluster id.
        path: The way that the bytes went, as in ``LLMDataDist.links()``.
        nbytes: Bytes moved.
        began_ns: When it began, on the monotonic clock.
        took_ns: How long it took, from the check of its arguments to its last byte.
    """

    operation: str
    peer: int
    path: str
    nbytes: int
    began_ns: int
    took_ns: int


TransferListener = Callable[[TransferRecord], None]


@dataclass
class TransferCounter:
    """All transfers of one kind.

    Attributes:
        operation: Such as "pull_blocks".
        peer: The peer's cluster id.
        path: The way that the bytes went.
        count: How many there were.
        nbytes: Bytes that they moved together.
        seconds: How long they took together.
        buckets: How many took how long; see :data:`NUM_BUCKETS`.
    """

    operation: str
    peer: int
    path: str
    count: int
    nbytes: int
    seconds: float
    buckets: tuple[int, ...]


class TransferLog:
    """What an instance knows of its own transfers.

    Thread safety: all methods may be called from any thread, and none blocks for long.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # (operation, peer, path) -> count, bytes, nanoseconds, buckets
        self._counters: dict[tuple[str, int, str], tuple[list[int], list[int]]] = {}
        self._errors: dict[tuple[str, int, str], int] = {}
        self._recent: deque[TransferRecord] = deque(maxlen=RECENT)
        self._listeners: tuple[TransferListener, ...] = ()

    # -- for transfers ----------------------------------------------------------------------------

    def record(self, operation: str, peer: int, path: str, nbytes: int, began_ns: int) -> None:
        """A transfer has moved its bytes. The one call that every transfer makes."""
        took_ns = time.monotonic_ns() - began_ns
        record = TransferRecord(operation, peer, path, nbytes, began_ns, took_ns)
        with self._lock:
            found = self._counters.get(record[:3])
            if found is None:
                found = self._counters[record[:3]] = [0, 0, 0], [0] * NUM_BUCKETS
            totals, buckets = found
            totals[0] += 1
            totals[1] += nbytes
            totals[2] += took_ns
            buckets[min((took_ns // 1000).bit_length(), NUM_BUCKETS - 1)] += 1
            self._recent.append(record)
        for listener in self._listeners:
            listener(record)

    def failed(self, operation: str, peer: int, status: str) -> None:
        """A transfer has ended with an error of this status."""
        with self._lock:
            key = operation, peer, status
            self._errors[key] = self._errors.get(key, 0) + 1

    # -- for readers -----------------------------------------------------------------------------

    def counters(self) -> list[TransferCounter]:
        """The counters as they are now."""
        with self._lock:
            return [
                TransferCounter(*key, count, nbytes, took_ns / 1e9, tuple(buckets))
                for key, ((count, nbytes, took_ns), buckets) in self._counters.items()
            ]

    def errors(self) -> dict[tuple[str, int, str], int]:
        """(operation, peer, name of the status) -> how many failed so."""
        with self._lock:
            return dict(self._errors)

    def recent(self) -> list[TransferRecord]:
        """The latest transfers, the oldest first."""
        with self._lock:
            return list(self._recent)

    @contextmanager
    def listening(self, listener: TransferListener) -> Iterator[None]:
        """Call this for each transfer meanwhile, in the thread that made it. It must not raise."""
        self.listen(listener)
        try:
            yield
        finally:
            self.unlisten(listener)

    def listen(self, listener: TransferListener) -> None:
        """Call this for each transfer from now on, in the thread that made it."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

    def unlisten(self, listener: TransferListener) -> None:
        """Do not call it any more."""
        with self._lock:
            self._listeners = tuple(each for each in self._listeners if each is not listener)
