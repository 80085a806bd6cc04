# SPDX-License-Identifier: Apache-2.0
"""Other processes for tests of links and transfers: each runs a service and does as it is told."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.caches import Ref, Span
from tests.service import Failure, Service, cluster, eventually

__all__ = [
    "Failure",
    "NearPeer",
    "Peer",
    "Ref",
    "Service",
    "Span",
    "cluster",
    "eventually",
    "spawn",
]

TIMEOUT_S = 60


class Peer:
    """A service in another process (or, without one, in this)."""

    def __init__(self, process: Any, connection: Connection) -> None:
        self.process = process
        self._connection = connection
        self._owed = 0
        self._closed = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the service; its failure is ours, with its traceback."""
        self.begin(name, *args, **kwargs)
        return self.answer()

    def begin(self, name: str, /, *args: Any, **kwargs: Any) -> None:
        """Call without waiting; ``answer`` returns what came of it."""
        self._connection.send((name, args, kwargs))
        self._owed += 1

    def answer(self, timeout: float = TIMEOUT_S) -> Any:
        if not self._connection.poll(timeout):
            raise AssertionError(f"no answer from process {self.pid} within {timeout} s")
        try:
            ok, value = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join(5)
            raise AssertionError(f"the peer died, exit code {self.process.exitcode}") from error
        self._owed -= 1
        if not ok:
            raise AssertionError(f"the peer failed:\n{value}")
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join(TIMEOUT_S)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The process sleeps meanwhile (SIGSTOP), all of its threads."""
        self.signal(signal.SIGSTOP)
        stats = [task / "stat" for task in Path(f"/proc/{self.pid}/task").iterdir()]
        assert eventually(
            lambda: all(stat.read_text().rpartition(") ")[2][0] == "T" for stat in stats)
        )
        try:
            yield
        finally:
            # It may have been killed meanwhile.
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._connection.close()
        if self._owed == 0:
            self.process.join(5)
        if self.process.is_alive():
            self.kill()
        self.process.close()


class NearPeer:
    """The same face for a service in this process."""

    def __init__(self, service: Service | None = None) -> None:
        self.service = Service() if service is None else service
        self.pid = os.getpid()

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.service, name)(*args, **kwargs)

    def close(self) -> None:
        self.service.finish()


def _serve(connection: Connection, kind: type[Service]) -> None:
    # Nobody outlives the test run, whatever it is doing.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    service = kind()
    while True:
        try:
            name, args, kwargs = connection.recv()
        except (EOFError, ConnectionError):
            service.finish()
            return
        try:
            answer = (True, getattr(service, name)(*args, **kwargs))
        except (Exception, SystemExit):  # noqa: BLE001 (whatever it is, the parent shows it)
            answer = (False, traceback.format_exc())
        connection.send(answer)


_CLONE_NEWNS, _CLONE_NEWPID, _MS_REC, _MS_PRIVATE = 0x20000, 0x20000000, 0x4000, 0x40000

_context = multiprocessing.get_context("forkserver")
# The server has torch imported, so that a new process starts in some milliseconds.
_context.set_forkserver_preload(["torch", "tests.peers"])


def _serve_hidden(connection: Connection, kind: type[Service]) -> None:
    """In a PID namespace of its own, with its own /proc, as in a container."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL)
    assert libc.unshare(_CLONE_NEWPID | _CLONE_NEWNS) == 0
    if child := os.fork():
        os.waitpid(child, 0)
        os._exit(0)
    assert libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
    assert libc.mount(b"proc", b"/proc", b"proc", 0, None) == 0
    _serve(connection, kind)


def spawn_hidden() -> Peer:
    """As :func:`spawn`, in a PID namespace of its own."""
    return spawn(serve=_serve_hidden)


def spawn(
    kind: type[Service] = Service, serve: Callable[[Connection, type[Service]], None] = _serve
) -> Peer:
    """A fresh process with a service, which shares nothing with this one. Close it."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=serve, args=(theirs, kind), daemon=True)
    process.start()
    theirs.close()
    return Peer(process, ours)
