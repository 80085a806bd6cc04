# SPDX-License-Identifier: Apache-2.0
"""Memory that is registered with our HIXL engine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from llm_datadist_torch.transports.base import MemoryKind, MemorySpan
from llm_datadist_torch.transports.hixl.engine import HixlEngine
from llm_datadist_torch.transports.hixl.ranges import RangeTable, RegisteredRange
from llm_datadist_torch.transports.hixl.statuses import FAILED, SUCCESS, hixl_error, meaning_of
from llm_datadist_torch.values.status import LLMException

logger = logging.getLogger("llm_datadist_torch")

MAX_RANGES = 4096
"""HIXL's limit."""


@dataclass(eq=False)
class _Registration:
    """One range that HIXL knows.

    Attributes:
        start: Its first address.
        end: The address after its last.
        kind: Which memory it is.
        handle: HIXL's name for it.
        generation: See `RegisteredRange`.
        users: How many spans lie in it. Without any it is to be deregistered.
        kept: What must stay alive until it has been deregistered.
    """

    start: int
    end: int
    kind: MemoryKind
    handle: object = None
    generation: int = 0
    users: int = 0
    kept: list[object] = field(default_factory=list)

    def contains(self, other: _Registration) -> bool:
        return self.kind is other.kind and self.start <= other.start and other.end <= self.end

    def overlaps(self, other: _Registration) -> bool:
        return self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        return f"{self.end - self.start} bytes of {self.kind.value} memory at {self.start:#x}"


@dataclass(eq=False)
class _Merge:
    """Ranges that one range replaces, as soon as they can be deregistered."""

    old: list[_Registration]
    new: _Registration
    error: LLMException | None = None
    done: bool = False


class Registrations:
    """Registers memory once, however many caches lie in it: HIXL refuses ranges that overlap.

    HIXL deregisters nothing while anybody is connected with the engine. So memory without users
    stays registered, and is kept alive, until :meth:`deregister_unused` finds a moment in which
    nobody is; if it is wanted again before that, nothing needs to be done at all.

    Thread safety: all methods may be called from any thread.

    Args:
        engine: Ours.
        quiesce: Disconnects everything, calls :meth:`deregister_unused` until it returns True,
            and returns that; or False when it gave up. Blocks. Called without any lock.
    """

    def __init__(self, engine: HixlEngine, quiesce: Callable[[], bool]) -> None:
        self._engine = engine
        self._quiesce = quiesce
        self._lock = threading.Lock()
        self._registered: list[_Registration] = []
        self._of_span: dict[tuple[int, int, str], list[_Registration]] = {}
        self._merges: list[_Merge] = []
        # What follows is read without the lock, which is held while HIXL registers.
        self.generation = 0
        self.changed_at = time.monotonic()
        self.ranges: tuple[RegisteredRange, ...] = ()
        self.table = RangeTable()

    @property
    def has_unused(self) -> bool:
        """Whether something waits to be deregistered."""
        return any(not known.users for known in self._registered) or bool(self._merges)

    def add(self, span: MemorySpan) -> list[RegisteredRange]:
        """Register the storage that a span lies in, unless that has been done.

        Returns:
            The ranges that are new.

        Raises:
            LLMException: HIXL refused; nothing has changed.
        """
        if span.storage not in (None, (span.address, span.nbytes)):
            try:
                return self._add(span, *span.storage)
            except LLMException as error:
                logger.debug("the storage of a tensor is not registered as a whole: %s", error)
        return self._add(span, span.address, span.nbytes)

    def _add(self, span: MemorySpan, start: int, nbytes: int) -> list[RegisteredRange]:
        wanted = _Registration(start, start + nbytes, span.kind)
        with self._lock:
            found = next((known for known in self._registered if known.contains(wanted)), None)
            if found is not None:
                self._use(found, span)
                return []
            old = [known for known in self._registered if known.overlaps(wanted)]
            if not old:
                self._register(wanted)
                self._use(wanted, span)
                return [self._published(wanted)]
            merge = self._merge(wanted, old)
        self._quiesce()
        with self._lock:
            if not merge.done:
                self._give_up(merge)
                raise merge.error or hixl_error(
                    FAILED, f"replace the registration of {old[0]}, which overlaps {wanted}"
                )
            self._use(merge.new, span)
            return [self._published(merge.new)]

    def remove(self, span: MemorySpan, keep: object = None) -> bool:
        """End one :meth:`add` of a span; without one nothing happens.

        Args:
            span: What was added.
            keep: What must live until the memory has been deregistered.

        Returns:
            Whether its memory waits to be deregistered, by :meth:`deregister_unused`.
        """
        key = _key(span)
        with self._lock:
            used = self._of_span.get(key)
            if not used:
                return False
            known = used.pop()
            if not used:
                del self._of_span[key]
            known.users -= 1
            if keep is not None:
                known.kept.append(keep)
            return known.users == 0

    def deregister_unused(self) -> bool:
        """Deregister what has no users, and merge what must be merged.

        Returns:
            False if HIXL refused, because somebody is connected.
        """
        with self._lock:
            return self._deregister_unused()

    def _deregister_unused(self) -> bool:
        for known in [known for known in self._registered if not known.users]:
            if not self._deregister(known):
                return False
        for merge in tuple(self._merges):
            if not all(self._deregister(known) for known in merge.old):
                return False
            self._merges.remove(merge)
            try:
                self._register(merge.new)
            except LLMException as error:
                merge.error = error
                for known in merge.old:
                    self._register(known)
            else:
                self._adopt(merge)
        return True

    def clear(self) -> None:
        """Deregister everything; what HIXL refuses ends with the engine."""
        with self._lock:
            self._of_span.clear()
            self._merges.clear()
            for known in self._registered:
                known.users = 0
            self._deregister_unused()
            self._registered.clear()
            self._changed()

    # -- with the lock held -----------------------------------------------------------------------

    def _use(self, known: _Registration, span: MemorySpan) -> None:
        known.users += 1
        known.kept.clear()  # the new user keeps the memory
        self._of_span.setdefault(_key(span), []).append(known)

    def _merge(self, wanted: _Registration, old: list[_Registration]) -> _Merge:
        if any(known.kind is not wanted.kind for known in old):
            raise hixl_error(
                FAILED,
                f"register {wanted}: it overlaps {old[0]}",
                remedy="one address is one memory.",
            )
        start = min(known.start for known in (wanted, *old))
        end = max(known.end for known in (wanted, *old))
        merge = _Merge(old, _Registration(start, end, wanted.kind))
        self._merges.append(merge)
        return merge

    def _give_up(self, merge: _Merge) -> None:
        if merge in self._merges:
            self._merges.remove(merge)
            for known in merge.old:
                if known not in self._registered and known.users:
                    self._register(known)

    def _adopt(self, merge: _Merge) -> None:
        merge.done = True
        for used in self._of_span.values():
            used[:] = [merge.new if known in merge.old else known for known in used]
        merge.new.users = sum(known.users for known in merge.old)

    def _register(self, wanted: _Registration) -> None:
        with self._engine.on_device():
            status, wanted.handle = self._engine.port.register(
                wanted.start, wanted.end - wanted.start, wanted.kind
            )
        if status != SUCCESS:
            raise hixl_error(
                status,
                f"register {wanted} ({len(self._registered)} of {MAX_RANGES} ranges are taken)",
                remedy="register whole tensors that don't overlap other registered memory in part;"
                " host memory should be pinned, and device memory that torch did not allocate must"
                " start at a multiple of 2 MiB.",
            )
        self.generation += 1
        wanted.generation = self.generation
        self._registered.append(wanted)
        self._changed()

    def _deregister(self, known: _Registration) -> bool:
        """Returns False if HIXL refuses it for now."""
        if known not in self._registered:
            return True
        with self._engine.on_device():
            status = self._engine.port.deregister(known.handle)
        if status == FAILED:
            return False
        if status != SUCCESS:
            logger.warning("HIXL could not deregister %s: %s", known, meaning_of(status)[0])
        self._registered.remove(known)
        known.kept.clear()
        self._changed()
        return True

    def _changed(self) -> None:
        self.ranges = tuple(self._published(known) for known in self._registered)
        self.table = RangeTable(self.ranges)
        self.changed_at = time.monotonic()

    @staticmethod
    def _published(known: _Registration) -> RegisteredRange:
        return RegisteredRange(known.start, known.end - known.start, known.generation)


def _key(span: MemorySpan) -> tuple[int, int, str]:
    # Without the storage: torch may have moved the tensor's since.
    return span.address, span.nbytes, str(span.device)
