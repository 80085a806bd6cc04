# SPDX-License-Identifier: Apache-2.0
"""A second process that does small things with its own memory when asked."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 60

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_pages(nbytes: int) -> int:
    """Fresh private zeroed memory, unknown to every allocator."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert address not in (None, 2**64 - 1), ctypes.get_errno()
    return address


def unmap(address: int, nbytes: int) -> None:
    assert _libc.munmap(address, nbytes) == 0, ctypes.get_errno()


def protect(address: int, nbytes: int, protection: int) -> None:
    assert _libc.mprotect(address, nbytes, protection) == 0, ctypes.get_errno()


def peek(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes)


def poke(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


class Service:
    """What the peer can be asked for, by method name."""

    def __init__(self) -> None:
        self._regions: dict[int, Any] = {}

    map_pages = staticmethod(map_pages)
    unmap = staticmethod(unmap)
    peek = staticmethod(peek)
    poke = staticmethod(poke)

    def make_region(self, nbytes: int) -> tuple[int, int, int, int]:
        import torch  # noqa: F401 (the native module needs its libraries)

        from llm_datadist_torch import _C

        region = _C.HostRegion.create(nbytes)
        self._regions[region.address] = region
        return region.address, region.fd, region.inode, region.device

    def free_region(self, address: int) -> None:
        del self._regions[address]

    def fail(self, text: str) -> None:
        raise RuntimeError(text)


def _serve(connection: Connection) -> None:
    service = Service()
    while True:
        try:
            name, args = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(service, name)(*args))
        except (Exception, SystemExit):  # noqa: BLE001 (whatever it is, the parent shows it)
            answer = (False, traceback.format_exc())
        connection.send(answer)


class Peer:
    def __init__(self, process: Any, connection: Connection) -> None:
        self.process = process
        self.pid: int = process.pid
        self._connection = connection

    def call(self, name: str, *args: object) -> Any:
        """Call a method of the peer's Service; its failure is ours, with its traceback."""
        self._connection.send((name, args))
        if not self._connection.poll(TIMEOUT_S):
            raise AssertionError(f"the peer did not answer {name} within {TIMEOUT_S} s")
        ok, value = self._connection.recv()
        if not ok:
            raise AssertionError(f"the peer failed:\n{value}")
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join(TIMEOUT_S)


@contextmanager
def spawned_peer() -> Iterator[Peer]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Peer(process, ours)
    finally:
        ours.close()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join(TIMEOUT_S)
        process.close()
