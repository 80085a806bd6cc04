# SPDX-License-Identifier: Apache-2.0
"""Registered memory: what an engine may read and write, and what its peers may."""

from __future__ import annotations

import bisect
import ctypes
import itertools
import logging
import threading
from collections.abc import Iterable
from typing import NamedTuple

from ascend_sim.hixl import runtime
from ascend_sim.hixl.constants import (
    ALIGNMENT,
    FAILED,
    PARAM_INVALID,
    SUCCESS,
)
from ascend_sim.hixl.types import UINT64_MAX, MemType

logger = logging.getLogger("hixl")

ENDED = UINT64_MAX
"""Version of the memory of an engine that was finalized."""

# Peers read versions at any time, also after the engine has gone: they live as long as the process.
_versions: list[ctypes.c_uint64] = []


class Range(NamedTuple):
    """A registered range, and the address by which its owner's process can be read and written."""

    addr: int
    length: int
    is_device: bool
    alias: int


class Ranges:
    """Ranges that don't overlap, to look addresses up in."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self.ranges = sorted(ranges)
        self._starts = [one.addr for one in self.ranges]

    def holding(self, addr: int, length: int) -> Range | None:
        """The range that holds all of these bytes."""
        place = bisect.bisect_right(self._starts, addr) - 1
        if place < 0:
            return None
        found = self.ranges[place]
        return found if addr + length <= found.addr + found.length else None

    def alias(self, addr: int, length: int) -> int | None:
        """Where these bytes can be read and written, None if they aren't registered."""
        found = self.holding(addr, length)
        return None if found is None else found.alias + addr - found.addr

    def overlap(self, addr: int, length: int) -> Range | None:
        """Some range that has a byte in common with this one."""
        return next(
            (r for r in self.ranges if r.addr < addr + length and addr < r.addr + r.length), None
        )


class LocalMemory:
    """What one engine has registered. Its version changes with it, and is read by its peers."""

    def __init__(self, device: int) -> None:
        self.ranges = Ranges()
        self._device = device
        self._lock = threading.Lock()
        self._handles: dict[int, Range] = {}
        self._numbers = itertools.count(1)
        self._version = ctypes.c_uint64(1)
        self._warned = False
        _versions.append(self._version)

    @property
    def version(self) -> int:
        """Another number after every change."""
        return self._version.value

    @property
    def version_address(self) -> int:
        """Where peers read the version in this process's memory."""
        return ctypes.addressof(self._version)

    def end(self) -> None:
        """Nothing is registered any more, and peers see that the engine has gone."""
        with self._lock:
            self._handles.clear()
            self.ranges = Ranges()
            self._version.value = ENDED

    def register(self, addr: int, length: int, kind: MemType) -> tuple[int, int]:
        """Returns a status and a handle: for the very same range again, the same handle."""
        if addr == 0 or length == 0 or addr + length > UINT64_MAX:
            return _refused(PARAM_INVALID, addr, length, "is empty, or goes beyond 64 bits"), 0
        with self._lock:
            for handle, known in self._handles.items():
                if known[:3] == (addr, length, kind is MemType.MEM_DEVICE):
                    return SUCCESS, handle
            other = self.ranges.overlap(addr, length)
            if other is not None:
                text = f"overlaps the registered {other.length} bytes at {other.addr:#x}"
                return _refused(PARAM_INVALID, addr, length, text), 0
            place = runtime.describe(addr, length)
            fault = self._fault(addr, length, kind, place)
            if place is None or fault:
                return _refused(FAILED, addr, length, fault), 0
            handle = next(self._numbers)
            self._handles[handle] = Range(addr, length, kind is MemType.MEM_DEVICE, place.alias)
            self._publish()
            return SUCCESS, handle

    def deregister(self, handle: int) -> int:
        """Transfers under way that use the range fail from now on."""
        with self._lock:
            if self._handles.pop(handle, None) is None:
                logger.error("deregister_mem: unknown handle %d", handle)
                return PARAM_INVALID
            self._publish()
            return SUCCESS

    def _publish(self) -> None:
        self.ranges = Ranges(self._handles.values())
        self._version.value += 1

    def _fault(self, addr: int, length: int, kind: MemType, place: runtime.Place | None) -> str:
        """Why such memory can't be registered, "" if it can."""
        if place is None:
            return "is device address space that is not wholly allocated"
        if kind is MemType.MEM_HOST:
            if place.kind == runtime.DEVICE:
                return "is device memory, and was said to be host memory"
            return "" if _is_mapped(addr, length) else "is not mapped"
        if place.kind != runtime.DEVICE:
            return "is host memory, and was said to be device memory"
        if place.device != self._device:
            return f"is on device {place.device}, but the engine is on device {self._device}"
        if addr % ALIGNMENT and not self._warned:
            self._warned = True
            logger.warning(
                "register_mem: device memory at %#x does not start at a multiple of 2 MiB, "
                "as HCCS wants for memory that is not from aclrtMalloc",
                addr,
            )
        return ""


def _is_mapped(addr: int, length: int) -> bool:
    """Whether the first and the last byte can be read."""
    return all(runtime.can_read(byte) for byte in (addr, addr + length - 1))


def _refused(status: int, addr: int, length: int, text: str) -> int:
    logger.error("register_mem: memory of %d bytes at %#x %s", length, addr, text)
    return status
