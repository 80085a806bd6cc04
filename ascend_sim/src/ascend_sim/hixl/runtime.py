# SPDX-License-Identifier: Apache-2.0
"""What the simulated engine asks of the simulated runtime, libascendcl.so, by ctypes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HOST, PINNED, DEVICE = range(3)
"""Kinds of memory: enum of sim_api.h."""


class _MemoryStruct(ctypes.Structure):
    """AscendSimMemory of sim_api.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("alias", ctypes.c_uint64),
        ("allocation", ctypes.c_uint64),
        ("allocation_size", ctypes.c_uint64),
    )


class _PieceStruct(ctypes.Structure):
    """AscendSimPiece of remote_copy.cpp."""

    _fields_ = (
        ("local", ctypes.c_uint64),
        ("remote", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
    )


Piece = tuple[int, int, int]
"""Local address, remote address, length."""


@dataclass(frozen=True)
class Place:
    """Where a range of this process's memory is, and its address for reading and writing."""

    kind: int
    device: int
    alias: int


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libascendcl.so")
        library.ascend_sim_remote_copy  # noqa: B018 - fails if it is another libascendcl
    except (OSError, AttributeError) as error:
        raise ImportError(
            "this is the simulated module hixl, and the simulated Ascend runtime is not active: "
            "run the program by `python -m ascend_sim -- python program.py`"
            f" ({error})",
            name="hixl",
        ) from error
    library.ascend_sim_scheduler.restype = ctypes.c_char_p
    library.ascend_sim_random.restype = ctypes.c_uint64
    library.ascend_sim_fault.argtypes = [ctypes.c_char_p]
    library.ascend_sim_describe.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.POINTER(_MemoryStruct),
    ]
    library.ascend_sim_remote_copy.argtypes = [
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_size_t,
    ]
    library.ascend_sim_allow_remote_copies.restype = None
    library.ascend_sim_allow_remote_copies()
    return library


_library = _load()


def current_context() -> int:
    """This thread's AscendCL context, 0 if it has none: no device was set."""
    context = ctypes.c_void_p()
    if _library.aclrtGetCurrentContext(ctypes.byref(context)) != 0:
        return 0
    return context.value or 0


def current_device() -> int:
    """The number of this thread's device, -1 if it has none."""
    return int(_library.ascend_sim_current_device())


def device_answers() -> bool:
    """Whether this thread's device is there: fault injection may have taken it away."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    hbm = 1
    error: int = _library.aclrtGetMemInfo(hbm, ctypes.byref(free), ctypes.byref(total))
    return error == 0


def describe(address: int, length: int) -> Place | None:
    """Where a range is, None if it is device address space that isn't wholly allocated."""
    memory = _MemoryStruct()
    if _library.ascend_sim_describe(address, length, ctypes.byref(memory)) != 0:
        return None
    return Place(memory.kind, memory.device, memory.alias)


def copy(pid: int, write: bool, pieces: Sequence[Piece]) -> int:
    """Copies between this process and another, or itself. Returns 0 or an errno; never faults."""
    array = (_PieceStruct * len(pieces))(*(_PieceStruct(*piece) for piece in pieces))
    return int(_library.ascend_sim_remote_copy(pid, write, array, len(pieces)))


def read_number(pid: int, address: int) -> int | None:
    """Reads a uint64 of another process, None if that can't be done."""
    number = ctypes.c_uint64()
    failed = copy(pid, False, [(ctypes.addressof(number), address, ctypes.sizeof(number))])
    return None if failed else number.value


def can_read(address: int) -> bool:
    """Whether there is a byte at an address of this process."""
    byte = ctypes.c_char()
    return copy(os.getpid(), False, [(ctypes.addressof(byte), address, 1)]) == 0


def fault(function: str) -> int:
    """The status that fault injection wants for this call of a function, or 0."""
    return int(_library.ascend_sim_fault(function.encode()))


def scheduler() -> str:
    """When asynchronous things happen: "lazy", "random" or "inline"."""
    name: bytes = _library.ascend_sim_scheduler()
    return name.decode()


def random_below(limit: int) -> int:
    """The next number of the random scheduler's generator, in [0, limit)."""
    return int(_library.ascend_sim_random()) % limit


def start_time(pid: int) -> int | None:
    """When a process started, in the kernel's ticks, None if there is none: ids are reused."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, which may hold anything, is in parentheses; the start is field 22 of the whole.
    return int(text.rpartition(")")[2].split()[19])
