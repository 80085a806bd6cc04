# SPDX-License-Identifier: Apache-2.0
"""Memory that is registered with one HIXL engine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llm_datadist_torch.transports.base import MemoryKind, MemorySpan
from llm_datadist_torch.transports.hixl.engine import HixlEngine
from llm_datadist_torch.transports.hixl.statuses import SUCCESS, hixl_error, meaning_of

logger = logging.getLogger("llm_datadist_torch")


@dataclass(eq=False)
class _Registration:
    span: MemorySpan
    handle: object
    users: int = 0

    def contains(self, span: MemorySpan) -> bool:
        return (
            span.kind is self.span.kind
            and self.span.address <= span.address
            and span.address + span.nbytes <= self.span.address + self.span.nbytes
        )


class Registrations:
    """Registers memory once, however many caches lie in it: HIXL refuses ranges that overlap.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self, engine: HixlEngine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._registered: list[_Registration] = []
        self._of_span: dict[MemorySpan, list[_Registration]] = {}
        self._bounds = _bounds_of(())

    def add(self, span: MemorySpan) -> None:
        """Register a span, unless it lies in memory that is registered.

        Raises:
            LLMException: HIXL refused; nothing has changed.
        """
        with self._lock:
            found = next((known for known in self._registered if known.contains(span)), None)
            if found is None:
                found = _Registration(span, self._register(span))
                self._registered.append(found)
                self._bounds = _bounds_of(known.span for known in self._registered)
            found.users += 1
            self._of_span.setdefault(span, []).append(found)

    def remove(self, span: MemorySpan) -> None:
        """End one :meth:`add` of a span; without one nothing happens."""
        with self._lock:
            used = self._of_span.get(span)
            if not used:
                return
            known = used.pop()
            if not used:
                del self._of_span[span]
            known.users -= 1
            if known.users == 0:
                self._registered.remove(known)
                self._bounds = _bounds_of(other.span for other in self._registered)
                self._deregister(known)

    def clear(self) -> None:
        """Deregister everything."""
        with self._lock:
            registered, self._registered = self._registered, []
            self._of_span.clear()
            self._bounds = _bounds_of(())
            for known in registered:
                self._deregister(known)

    def cover(self, addrs: torch.Tensor, nbytes: int) -> bool:
        """Whether ``nbytes`` from each of ``addrs`` (int64 [n]) lie inside registered spans."""
        starts, ends = self._bounds
        if not len(starts):
            return False
        at = (torch.searchsorted(starts, addrs, right=True) - 1).clamp(min=0)
        return bool(((addrs >= starts[at]) & (addrs + nbytes <= ends[at])).all())

    def _register(self, span: MemorySpan) -> object:
        module = self._engine.module
        kinds = {
            MemoryKind.DEVICE: module.MemType.MEM_DEVICE,
            MemoryKind.HOST: module.MemType.MEM_HOST,
        }
        with self._engine.on_device():
            status, handle = self._engine.hixl.register_mem(
                module.MemDesc(span.address, span.nbytes), kinds[span.kind]
            )
        if status != SUCCESS:
            raise hixl_error(
                status,
                f"register {span.nbytes} bytes of {span.device} memory at {span.address:#x}",
                remedy="register whole tensors that don't overlap other registered memory in part;"
                " host memory should be pinned, and device memory that torch did not allocate must"
                " start at a multiple of 2 MiB.",
            )
        return handle

    def _deregister(self, known: _Registration) -> None:
        with self._engine.on_device():
            status = self._engine.hixl.deregister_mem(known.handle)
        if status != SUCCESS:
            name, _ = meaning_of(status)
            logger.warning("HIXL could not deregister %s: %s (%d)", known.span, name, status)


def _bounds_of(spans: Iterable[MemorySpan]) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and ends, int64, in order of the starts."""
    order = sorted(spans, key=lambda span: span.address)
    starts = torch.tensor([span.address for span in order], dtype=torch.int64)
    return starts, torch.tensor([span.address + span.nbytes for span in order], dtype=torch.int64)
