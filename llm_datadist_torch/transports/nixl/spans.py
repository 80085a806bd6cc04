# SPDX-License-Identifier: Apache-2.0
"""The memory that an instance has published, which agents register when they first move it."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter

import torch

from llm_datadist_torch.transports.base import MemorySpan
from llm_datadist_torch.values.checks import param_error


class Spans:
    """Published memory; each span that lies in none of the others counts once.

    Spans lie apart or inside each other. Their bounds are in one tensor too, so that thousands of
    caches cost a publication some microseconds, and a movement nothing unless there are new ones.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: Counter[MemorySpan] = Counter()
        self._rows: dict[MemorySpan, int] = {}
        self._by_row: list[MemorySpan] = []
        self._bounds = torch.empty(16, 2, dtype=torch.int64)
        self._outer: tuple[list[MemorySpan], list[int]] | None = None

    def add(self, span: MemorySpan) -> None:
        """Publish a span, once more if it is there.

        Raises:
            LLMParamError: It overlaps another one in part, which NIXL could not tell apart.
        """
        with self._lock:
            if span not in self._users:
                self._check(span)
                self._append(span)
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
            self._delete(span)
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
        starts, ends = self._bounds[: len(self._rows)].unbind(1)
        apart = (ends <= start) | (starts >= end)
        nested = ((starts <= start) & (ends >= end)) | ((starts >= start) & (ends <= end))
        in_part = ~(apart | nested)
        if bool(in_part.any()):
            raise param_error(
                f"{span.nbytes} bytes at {start:#x} overlap registered memory at"
                f" {int(starts[in_part][0]):#x} in part",
                remedy="register whole tensors.",
            )

    def _append(self, span: MemorySpan) -> None:
        row = len(self._rows)
        if row == len(self._bounds):
            self._bounds = torch.cat((self._bounds, torch.empty_like(self._bounds)))
        self._bounds[row] = torch.tensor([span.address, span.address + span.nbytes])
        self._rows[span] = row
        self._by_row.append(span)
        self._outer = None

    def _delete(self, span: MemorySpan) -> None:
        row, moved = self._rows.pop(span), self._by_row.pop()
        if moved != span:
            # The last one takes its place.
            self._rows[moved], self._by_row[row] = row, moved
            self._bounds[row] = self._bounds[len(self._by_row)]
        self._outer = None

    def _find_outer(self) -> tuple[list[MemorySpan], list[int]]:
        """Spans inside no other, by address; and where they start."""
        outer: list[MemorySpan] = []
        for span in sorted(self._rows, key=lambda span: (span.address, -span.nbytes)):
            if not outer or span.address >= outer[-1].address + outer[-1].nbytes:
                outer.append(span)
        return outer, [span.address for span in outer]
