# SPDX-License-Identifier: Apache-2.0
"""The memory that an instance has published, which agents register when they first move it."""

from __future__ import annotations

import threading
from collections import Counter

import torch

from llm_datadist_torch.transports.base import MemorySpan
from llm_datadist_torch.values.checks import param_error


class Spans:
    """Published memory; each span that lies in none of the others counts once.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: Counter[MemorySpan] = Counter()

    def add(self, span: MemorySpan) -> None:
        """Publish a span, once more if it is there.

        Raises:
            LLMParamError: It overlaps another one in part, which NIXL could not tell apart.
        """
        end = span.address + span.nbytes
        with self._lock:
            for other in self._users:
                other_end = other.address + other.nbytes
                apart = end <= other.address or other_end <= span.address
                inside = other.address <= span.address and end <= other_end
                around = span.address <= other.address and other_end <= end
                if not (apart or inside or around):
                    raise param_error(
                        f"{span.nbytes} bytes at {span.address:#x} overlap registered memory at"
                        f" {other.address:#x} in part",
                        remedy="register whole tensors.",
                    )
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
            return True

    def of(self, addrs: torch.Tensor, nbytes: int) -> list[MemorySpan]:
        """The largest spans that ``nbytes`` from each of ``addrs`` (int64 [n]) lie in.

        Raises:
            LLMParamError: Some lie in none.
        """
        with self._lock:
            spans = sorted(self._users, key=lambda span: (span.address, -span.nbytes))
        outer: list[MemorySpan] = []
        for span in spans:
            if not outer or span.address >= outer[-1].address + outer[-1].nbytes:
                outer.append(span)
        if outer:
            starts = torch.tensor([span.address for span in outer])
            ends = torch.tensor([span.address + span.nbytes for span in outer])
            at = (torch.searchsorted(starts, addrs, right=True) - 1).clamp(min=0)
            if bool(((addrs >= starts[at]) & (addrs + nbytes <= ends[at])).all()):
                return [outer[index] for index in sorted(set(at.tolist()))]
        raise param_error(
            "the memory is not registered with NIXL",
            remedy="allocate the cache here, or register it with remote_accessible=True.",
        )
