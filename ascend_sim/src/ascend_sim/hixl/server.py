# SPDX-License-Identifier: Apache-2.0
"""What an engine tells its peers: where its registered memory is. And the notifies they send."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import threading
from collections import Counter, deque

from ascend_sim.hixl import runtime, wire
from ascend_sim.hixl.constants import MAX_UNREAD_NOTIFIES
from ascend_sim.hixl.memory import LocalMemory


class Inbox:
    """Notifies that nobody has read yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unread: deque[tuple[int, str, str]] = deque()
        self._counts: Counter[int] = Counter()

    def put(self, link: int, name: str, text: str) -> bool:
        """Keeps a notify, unless too many of this link are unread."""
        with self._lock:
            if self._counts[link] >= MAX_UNREAD_NOTIFIES:
                return False
            self._counts[link] += 1
            self._unread.append((link, name, text))
            return True

    def take(self) -> list[tuple[str, str]]:
        """All unread ones, in the order of arrival."""
        with self._lock:
            taken = [(name, text) for _, name, text in self._unread]
            self._unread.clear()
            self._counts.clear()
            return taken


class Server(socketserver.ThreadingTCPServer):
    """Listens on the engine's address; one daemon thread per link of a peer."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, engine: str, host: str, port: int, memory: LocalMemory) -> None:
        """Binds and starts to listen.

        Raises:
            OSError: the address can't be had.
        """
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.engine = engine
        self.memory = memory
        self.inbox = Inbox()
        self._connections: set[socket.socket] = set()
        self._stopped = False
        self._lock = threading.Lock()
        super().__init__((host, port), _Session)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.1,), name="hixl-server", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stops to listen, and ends the links of all peers."""
        self.shutdown()
        self.server_close()
        with self._lock:
            self._stopped = True
            for connection in self._connections:
                close(connection)

    def enter(self, connection: socket.socket) -> None:
        """A peer has connected.

        Raises:
            ConnectionError: in the very moment in which the engine stopped.
        """
        with self._lock:
            if self._stopped:
                raise ConnectionAbortedError("the engine has stopped")
            self._connections.add(connection)

    def leave(self, connection: socket.socket) -> None:
        """A peer has gone."""
        with self._lock:
            self._connections.discard(connection)

    def table(self) -> wire.Message:
        """Registered memory and its version."""
        # The version first: a change in between leaves an old version, and the peer asks again.
        version = self.memory.version
        return {"version": version, "ranges": self.memory.ranges.ranges}

    def welcome(self, wanted: object) -> wire.Message:
        """The answer to a peer that connects."""
        if wanted != self.engine:
            return {"refused": f"this engine is {self.engine!r}, not {wanted!r}"}
        pid = os.getpid()
        return self.table() | {
            "pid": pid,
            "start": runtime.start_time(pid),
            "version_address": self.memory.version_address,
        }


class _Session(socketserver.BaseRequestHandler):
    """One peer's link."""

    server: Server

    def handle(self) -> None:
        try:
            self.server.enter(self.request)
            while True:
                wire.send(self.request, self._answer(wire.receive(self.request)))
        except OSError:
            pass  # The peer has gone, or the engine is being finalized.
        finally:
            self.server.leave(self.request)

    def _answer(self, message: wire.Message) -> wire.Message:
        if "hello" in message:
            return self.server.welcome(message["hello"])
        if "notify" in message:
            name, text = message["notify"]
            return {"kept": self.server.inbox.put(id(self), name, text)}
        return self.server.table()


def close(connection: socket.socket) -> None:
    """Closes a connection; whoever waits on it wakes up."""
    with contextlib.suppress(OSError):  # The other side may be faster.
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
