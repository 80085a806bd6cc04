# SPDX-License-Identifier: Apache-2.0
"""The memory that an instance has published, which agents register when they first move it."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections import Counter

import torch

from llm_datadist_torch.transports.base import MemorySpan
from llm_datadist_torch.values.checks import param_error


class Spans:
    """Published memory; each span that lies in none of the others counts once.

    Spans lie apart or inside each other. Their bounds are in two sorted lists too, so that with
    thousands of caches a publication costs some microseconds, and a movement nothing unless there
    are new ones.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: Counter[MemorySpan] = Counter()
        self._by_start: list[tuple[int, int]] = []  # (start, end)
        self._by_end: list[tuple[int, int]] = []  # (end, start)
        self._outer: tuple[list[MemorySpan], list[int]] | None = None

    def add(self, span: MemorySpan) -> None:
        """Publish a span, once more if it is there.

        Raises:
            LLMParamError: It overlaps another one in part, which NIXL could not tell apart.
        """
        with self._lock:
            if span not in self._users:
                self._check(span)
                start, end = span.address, span.address + span.nbytes
                insort(self._by_start, (start, end))
                insort(self._by_end, (end, start))
                self._outer = None
            self._users[span] += 1

    def remove(self, span: MemorySpan) -> bool:
        """End one :meth:`add`; whether it was the last."""
        with self._lock:
            if span not in self._users:
                return False
            self._users[span] -= 1
            if self._users[span]:
                return False
            del self._users[span]
            start, end = span.address, span.address + span.nbytes
            del self._by_start[bisect_left(self._by_start, (start, end))]
            del self._by_end[bisect_left(self._by_end, (end, start))]
            self._outer = None
            return True

    def of(self, addrs: torch.Tensor, nbytes: int) -> list[MemorySpan]:
        """The largest spans that ``nbytes`` from each of ``addrs`` (int64 [n]) lie in.

        Raises:
            LLMParamError: Some lie in none.
        """
        with self._lock:
            if self._outer is None:
                self._outer = self._find_outer()
            outer, starts = self._outer
        # A cache has tens of tensors: a loop is done before tensor operations would begin.
        found: dict[MemorySpan, None] = {}
        for address in sorted(addrs.tolist()):
            at = bisect_right(starts, address) - 1
            if at < 0 or address + nbytes > outer[at].address + outer[at].nbytes:
                raise param_error(
                    "the memory is not registered with NIXL",
                    remedy="allocate the cache here, or register it with remote_accessible=True.",
                )
            found[outer[at]] = None
        return list(found)

    # -- with the lock held -----------------------------------------------------------------------

    def _check(self, span: MemorySpan) -> None:
        start, end = span.address, span.address + span.nbytes
        begin, stop = (start + 1, 0), (end, 0)
        # Those that begin inside and end outside, and those that end inside and begin outside.
        first, last = bisect_left(self._by_start, begin), bisect_left(self._by_start, stop)
        in_part = [their for their, until in self._by_start[first:last] if until > end]
        first, last = bisect_left(self._by_end, begin), bisect_left(self._by_end, stop)
        in_part += [their for _, their in self._by_end[first:last] if their < start]
        if in_part:
            raise param_error(
                f"{span.nbytes} bytes at {start:#x} overlap registered memory at"
                f" {in_part[0]:#x} in part",
                remedy="register whole tensors.",
            )

    def _find_outer(self) -> tuple[list[MemorySpan], list[int]]:
        """Spans inside no other, by address; and where they start."""
        outer: list[MemorySpan] = []
        for span in sorted(self._users, key=lambda span: (span.address, -span.nbytes)):
            if not outer or span.address >= outer[-1].address + outer[-1].nbytes:
                outer.append(span)
        return outer, [span.address for span in outer]
