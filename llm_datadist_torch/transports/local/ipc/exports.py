# SPDX-License-Identifier: Apache-2.0
"""Device memory of this process that peers have been given keys to."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory import device_copies
from llm_datadist_torch.memory.allocate import allocate_tensors
from llm_datadist_torch.memory.npu_address import (
    WITHOUT_EXPANDABLE_SEGMENTS,
    segment_at,
    segments_of,
)
from llm_datadist_torch.memory.region import Region
from llm_datadist_torch.net.process import PeerProcess
from llm_datadist_torch.transports.base import CacheVersion, MemorySpan, RegionView
from llm_datadist_torch.transports.local.ipc.messages import SharedMemory
from llm_datadist_torch.transports.local.ipc.runtime import ipc_runtime
from llm_datadist_torch.transports.local.mappings import WORD_BYTES
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import (
    LLMException,
    LLMStatusCode,
    error_for,
)

logger = logging.getLogger("llm_datadist_torch")

_COUNTERS = 4096
"""Per region of them: 64 KiB."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.25
"""Between two looks at what peers have closed; each pause is twice the one before."""


class _Counter(NamedTuple):
    """One pair of counters in shareable memory, of which the first is used.

    Attributes:
        region: Where it is.
        offset: In the region.
        before: What it was when a reader was told of it.
    """

    region: Region
    offset: int
    before: int

    @property
    def unchanged(self) -> bool:
        return _C.load_word(self.region.address + self.offset) == self.before

    @property
    def told(self) -> CacheVersion:
        return CacheVersion(RegionView.of(self.region), self.offset, self.before, 0)


class _Counters:
    """Ever new ones: nobody gets one that a peer might still increment, because it may twice."""

    def __init__(self) -> None:
        self._unused: list[_Counter] = []

    def take(self) -> _Counter:
        """One more.

        Raises:
            LLMOutOfMemoryError: There is no memory for it.
            LLMFeatureNotEnabledError: Memory can't be shared with other processes.
        """
        if not self._unused:
            _, region = allocate_tensors((_COUNTERS, 2), torch.int64, 1)
            if not region.shareable:
                raise _unsuitable(f"nor can counters: {region.reason}")
            offsets = range(0, 2 * WORD_BYTES * _COUNTERS, 2 * WORD_BYTES)
            self._unused = [
                _Counter(region, offset, _C.load_word(region.address + offset))
                for offset in offsets
            ]
        return self._unused.pop()


@dataclass(frozen=True, eq=False)
class Reader:
    """A peer's end of one link.

    Attributes:
        process: Its process.
        number: What the driver calls that.
        tell_ended: Tells it that memory is to be closed. Does not block.
    """

    process: PeerProcess
    number: int
    tell_ended: Callable[[list[SharedMemory]], None]


@dataclass(eq=False)
class _Opening:
    """A peer was told a key once, and may have the memory open since.

    Attributes:
        link: Names the link.
        reader: Its other end.
        counter: By which the peer says that it has not any more.
        is_told: It has been told to close it.
    """

    link: object
    reader: Reader
    counter: _Counter
    is_told: bool = False


@dataclass(eq=False)
class _Export:
    """One allocation with a key.

    Attributes:
        start: Its address.
        end: The address behind it.
        device: Where it is.
        key: What peers import it by.
        allowed: The processes that may.
        openings: By whom it may be open.
        ending: Nothing in it is registered any more: it is closed as soon as nobody has it open.
        kept: What must stay alive until then.
    """

    start: int
    end: int
    device: torch.device
    key: bytes
    allowed: set[int] = field(default_factory=set)
    openings: list[_Opening] = field(default_factory=list)
    ending: bool = False
    kept: list[object] = field(default_factory=list)

    def overlaps(self, start: int, nbytes: int) -> bool:
        return self.start < start + nbytes and start < self.end

    def forget_closed(self) -> None:
        """Who has said that it is closed, or whose process has ended, has it open no more."""
        self.openings = [
            opening
            for opening in self.openings
            if opening.counter.unchanged and opening.reader.process.alive
        ]

    def show(self, link: object, reader: Reader, counters: _Counters) -> SharedMemory:
        """What this link is told: the same as before, unless it was told to close that."""
        for opening in self.openings:
            if opening.link is link and not opening.is_told:
                return self._told(opening)
        if reader.number not in self.allowed:
            ipc_runtime().allow(self.key, reader.number)
            self.allowed.add(reader.number)
        self.openings.append(_Opening(link, reader, counters.take()))
        return self._told(self.openings[-1])

    def begin_end(self) -> list[tuple[Reader, SharedMemory]]:
        """Who must be told to close what."""
        self.ending = True
        self.forget_closed()
        new = [opening for opening in self.openings if not opening.is_told]
        for opening in new:
            opening.is_told = True
        return [(opening.reader, self._told(opening)) for opening in new]

    def revive(self) -> list[object]:
        """It is registered again. Who was told to close it does so; returns what may be let go."""
        self.ending = False
        released, self.kept = self.kept, []
        return released

    def _told(self, opening: _Opening) -> SharedMemory:
        return SharedMemory(self.start, self.end - self.start, self.key, opening.counter.told)


class Exports:
    """Gives out keys to allocations, each once, and sees to it that none is freed while it is open.

    An allocation that a peer has open must not be freed, and its key not be closed. So when the
    last registered memory in it ends, the peers that were told its key are asked to close it, and
    the memory is kept until all have, or their processes have ended. They say so by a counter in
    shareable memory, which also works after their link. If memory in it is registered again before
    that, a peer that asks gets the same key once more, with another counter.

    AscendCL exports whole allocations only: a peer that is shown one tensor of torch_npu's can
    reach all of the segment it is in, as it can reach all of a process by process_vm_readv.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._registered: Counter[tuple[int, int]] = Counter()
        self._exports: list[_Export] = []
        self._ended_links: set[object] = set()
        self._counters = _Counters()
        self._closing = False

    @property
    def open_bytes(self) -> int:
        """Bytes of the allocations that have keys."""
        with self._lock:
            return sum(each.end - each.start for each in self._exports)

    def register(self, span: MemorySpan) -> None:
        """Memory that peers may be shown, until it is unregistered as often."""
        with self._lock:
            self._registered[span.address, span.nbytes] += 1

    def retire(self, span: MemorySpan, keep: object) -> None:
        """End one :meth:`register`; ``keep`` is let go once nobody has the memory open any more.

        Does not block.
        """
        if self._end(span, keep):
            self._close_later()

    def unregister(self, span: MemorySpan) -> None:
        """End one :meth:`register`; its owner may free it after :meth:`wait_closed`.

        Does not block.
        """
        if self._end(span, None):
            self._close_later()

    def wait_closed(self, spans: Sequence[MemorySpan], deadline: Deadline) -> None:
        """Block until nobody has memory open that was unregistered, or until the deadline."""
        pause = _SHORTEST_PAUSE_S
        while left := self._left_open(spans):
            if deadline.expired:
                logger.warning(
                    "%d bytes at %#x, and %d further ranges, stay open in another process after"
                    " %d ms; keep that memory until it has closed them or ended, or register"
                    " tensors instead of addresses, which are kept",
                    left[0].nbytes,
                    left[0].address,
                    len(left) - 1,
                    deadline.budget_ms,
                )
                return
            time.sleep(min(pause, deadline.remaining_s()))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def show(
        self, addrs: Iterable[int], extent: int, device: torch.device, link: object, reader: Reader
    ) -> list[SharedMemory]:
        """Keys to the allocations that tensors of a registered cache lie in.

        Args:
            addrs: Their addresses.
            extent: Bytes of each.
            device: Where they are.
            link: Names the link.
            reader: Its other end.

        Raises:
            LLMFeatureNotEnabledError: They can't be exported.
            LLMDeviceError: The runtime refuses.
        """
        released: list[object] = []
        with self._lock, device_copies.current_device(device):
            exports = [self._export_of(address, extent, device) for address in addrs]
            shown: list[SharedMemory] = []
            for export in dict.fromkeys(exports):
                export.forget_closed()
                released += export.revive()
                shown.append(export.show(link, reader, self._counters))
        released.clear()
        return shown

    def end_link(self, link: object) -> None:
        """Let the reader at the other end of a link go once it has nothing open any more.

        The readers hold descriptors of their processes. Does not block.
        """
        with self._lock:
            self._ended_links.add(link)
        if not self._close_unused():
            self._close_later()

    def _export_of(self, address: int, extent: int, device: torch.device) -> _Export:
        known = next((one for one in self._exports if one.overlaps(address, extent)), None)
        start, end = (known.start, known.end) if known else _allocation_of(address, device)
        _check_inside(address, extent, start, end)
        if not any(start <= at < end for at, _ in self._registered):
            raise _unsuitable("it is not registered")
        if known is None:
            known = _Export(start, end, device, ipc_runtime().export(start, end - start))
            self._exports.append(known)
        return known

    def _end(self, span: MemorySpan, keep: object) -> bool:
        """Returns whether the memory is open somewhere, so that it must be waited for."""
        name = (span.address, span.nbytes)
        told: list[tuple[Reader, SharedMemory]] = []
        with self._lock:
            before = self._registered[name]
            if before != 1:
                if before:
                    self._registered[name] -= 1
                return False
            del self._registered[name]
            ending = [
                export
                for export in self._exports
                if export.overlaps(*name)
                and not any(export.overlaps(*other) for other in self._registered)
            ]
            for export in ending:
                told += export.begin_end()
                export.kept.append(keep)
        for reader, memory in told:
            with suppress(LLMException):  # a link that has ended: the peer closes it by itself
                reader.tell_ended([memory])
        return bool(ending) and not self._close_unused()

    def _left_open(self, spans: Sequence[MemorySpan]) -> list[MemorySpan]:
        self._close_unused()
        with self._lock:
            ending = [export for export in self._exports if export.ending]
            return [
                span
                for span in spans
                if any(export.overlaps(span.address, span.nbytes) for export in ending)
            ]

    def _close_unused(self) -> bool:
        """Close what nobody has open any more; whether nothing is left to wait for."""
        released: list[object] = []
        with self._lock:
            for export in list(self._exports):
                export.forget_closed()
                if export.ending and not export.openings and _close(export):
                    self._exports.remove(export)
                    released += export.kept
            left = self._awaits_readers()
        released.clear()
        return not left

    def _awaits_readers(self) -> bool:
        """Whether memory is to be closed, or the reader of an ended link has some open."""
        self._ended_links &= {
            opening.link for export in self._exports for opening in export.openings
        }
        return bool(self._ended_links) or any(export.ending for export in self._exports)

    def _close_later(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
        threading.Thread(target=self._close_all, name="llmdd-ipc-close", daemon=True).start()

    def _close_all(self) -> None:
        pause = _SHORTEST_PAUSE_S
        while True:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            self._close_unused()
            with self._lock:
                if not self._awaits_readers():
                    self._closing = False
                    return


def _allocation_of(address: int, device: torch.device) -> tuple[int, int]:
    """Start and end of the allocation of the runtime's that an address is in.

    Raises:
        LLMFeatureNotEnabledError: It is in none that could be exported.
    """
    segment = segment_at(segments_of(device), address)
    if segment is not None and segment.expandable:
        raise _unsuitable(
            "it is in an expandable segment of torch_npu's",
            f"{WITHOUT_EXPANDABLE_SEGMENTS}, or let this library allocate the cache.",
        )
    if segment is not None:
        return segment.start, segment.end
    found = ipc_runtime().allocation_of(address)
    if found is None:
        raise _unsuitable(
            "neither torch_npu nor this runtime knows the allocation that it is in",
            "let torch_npu or this library allocate it.",
        )
    return found[0], found[0] + found[1]


def _check_inside(address: int, extent: int, start: int, end: int) -> None:
    if not (start <= address and address + extent <= end):
        raise _unsuitable(
            "it reaches beyond one allocation", "register tensors that lie in one allocation each."
        )


def _unsuitable(reason: str, remedy: str = "") -> LLMException:
    text = f"memory can't be shared with other processes: {reason}"
    return error_for(LLMStatusCode.LLM_FEATURE_NOT_ENABLED, text, remedy=remedy or None)


def _close(export: _Export) -> bool:
    try:
        with device_copies.current_device(export.device):
            ipc_runtime().close(export.key)
    except RuntimeError as error:  # of torch_npu's, too: it may be ending
        logger.debug("a key is not closed yet: %s", error)
        return False
    return True


EXPORTS = Exports()
"""Those of this process; instances share them, because an allocation gets one key."""
