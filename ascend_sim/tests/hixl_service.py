# SPDX-License-Identifier: Apache-2.0
"""A process under the simulator that evaluates what a test sends: ``python -m ... FD``."""

from __future__ import annotations

import ast
import ctypes
import enum
import logging
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

import hixl

from ascend_sim import faults
from ascend_sim.hixl import library

runtime = ctypes.CDLL("libascendcl.so")
engines: list[hixl.Hixl] = []


class Host:
    """Host memory that was not taken from the runtime."""

    def __init__(self, data: bytes) -> None:
        self._memory = (ctypes.c_char * len(data)).from_buffer_copy(data)
        self.addr = ctypes.addressof(self._memory)
        self.length = len(data)

    @property
    def data(self) -> bytes:
        return self._memory.raw

    def fill(self, value: int) -> None:
        ctypes.memset(self.addr, value, self.length)


class Device:
    """Device memory from aclrtMalloc."""

    def __init__(self, data: bytes, device: int = 0) -> None:
        runtime.aclrtSetDevice(device)
        self.length = len(data)
        pointer = ctypes.c_void_p()
        assert runtime.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(self.length), 0) == 0
        self.addr = pointer.value or 0
        self.data = data
        runtime.aclrtSetDevice(0)

    def _copy(self, to: int, source: int, kind: int) -> None:
        size = ctypes.c_size_t(self.length)
        arguments = (ctypes.c_void_p(to), size, ctypes.c_void_p(source), size, kind)
        assert runtime.aclrtMemcpy(*arguments) == 0

    @property
    def data(self) -> bytes:
        host = Host(bytes(self.length))
        self._copy(host.addr, self.addr, 2)
        return host.data

    @data.setter
    def data(self, data: bytes) -> None:
        host = Host(data)
        self._copy(self.addr, host.addr, 1)

    def fill(self, value: int) -> None:
        self.data = bytes([value]) * self.length

    def free(self) -> None:
        assert runtime.aclrtFree(ctypes.c_void_p(self.addr)) == 0


def engine(name: str, **options: str) -> hixl.Hixl:
    """An engine that may connect to others on its device, unless the options say otherwise."""
    options = {"LocalCommRes": '{"version": "1.3"}'} | options
    made = hixl.Hixl()
    engines.append(made)
    assert made.initialize(name, options) == hixl.SUCCESS
    return made


def register(of: hixl.Hixl, memory: Host | Device) -> int:
    kind = hixl.MEM_HOST if isinstance(memory, Host) else hixl.MEM_DEVICE
    status, handle = of.register_mem(hixl.MemDesc(memory.addr, memory.length), kind)
    assert status == hixl.SUCCESS
    return handle


def descs(*pieces: tuple[int, int, int]) -> list[hixl.TransferOpDesc]:
    return [hixl.TransferOpDesc(*piece) for piece in pieces]


def end_of(of: hixl.Hixl, request: int) -> tuple[int, hixl.TransferStatus]:
    """Asks until the transfer is over."""
    while True:
        status, state = of.get_transfer_status(request)
        if status != hixl.SUCCESS or state is not hixl.TransferStatus.WAITING:
            return status, state


def eventually(condition: Any) -> bool:
    """Waits until something is true."""
    until = threading.Event()
    return any(condition() or until.wait(0.01) for _ in range(1000))


def in_thread(call: Any, device: int | None = None) -> Any:
    """What a call returns in another thread, with or without a current device there."""
    results = []

    def work() -> None:
        if device is not None:
            runtime.aclrtSetDevice(device)
        results.append(call())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return results[0]


def engine_limit(name: str, value: int) -> int:
    """Changes a limit of the engine; returns what it was."""
    return library.call("limit", name.encode(), value)


def reset() -> None:
    faults.reset()
    while engines:
        engines.pop().finalize()


def plain(value: Any) -> Any:
    """What a process without the simulator can read."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return type(value)(plain(one) for one in value)
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return value if isinstance(value, (bool, int, str, bytes, type(None))) else repr(value)


def evaluate(code: str, names: dict[str, Any]) -> Any:
    """Runs statements; the value of the last, if it is an expression.

    Let it not be a tensor: to show one waits for its stream.
    """
    body = ast.parse(code).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "<test>", "exec"), names)
    if last is None:
        return None
    return plain(eval(compile(ast.Expression(last.value), "<test>", "eval"), names))


def serve(connection: Connection) -> None:
    runtime.aclrtSetDevice(0)
    names: dict[str, Any] = globals()
    while True:
        try:
            code, given = connection.recv()
        except EOFError:
            return
        names |= given
        try:
            answer = (True, evaluate(code, names))
        except Exception:  # noqa: BLE001 - whatever it is, the test is told
            answer = (False, traceback.format_exc())
        connection.send(answer)


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    serve(Connection(int(sys.argv[1])))
