# SPDX-License-Identifier: Apache-2.0
"""A connection that passes through this process, so that it can be cut."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_LOOK_S = 0.05
_SEND_S = 1.0
_PIECE = 1 << 16


class CancellableProxy:
    """A local port that leads to a connection of ours.

    torch's TCPStore has no way to end a call to a server that has fallen silent. It is connected
    through this. Closing it, or ``cancelled`` becoming true, ends all calls with an error.

    A context manager; leaving it closes all sockets, and waits for the thread.

    Thread safety: ``close`` may be called from any thread.

    Args:
        far: The connection; it is closed with the conduit.
        cancelled: Looked at many times a second.
    """

    def __init__(self, far: socket.socket, cancelled: Callable[[], bool]) -> None:
        self._far = far
        self._cancelled = cancelled
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(
            target=self._run, name="llm_datadist_torch.conduit", daemon=True
        )
        self._thread.start()

    def flush(self) -> None:
        """Wait until all has been passed on, after the caller's side has been closed."""
        self._thread.join(_SEND_S)

    def close(self) -> None:
        """Cut it."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Self:
        """The conduit itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Cut it."""
        self.close()

    def _run(self) -> None:
        with self._far, self._listener:
            near = self._accept()
            if near is not None:
                with near, suppress(OSError):
                    self._pass_on(near)

    def _ended(self) -> bool:
        return self._closed.is_set() or self._cancelled()

    def _accept(self) -> socket.socket | None:
        self._listener.settimeout(_LOOK_S)
        while not self._ended():
            try:
                near = self._listener.accept()[0]
            except TimeoutError:
                continue
            # There is one caller; nobody else gets in.
            self._listener.close()
            return near
        return None

    def _pass_on(self, near: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            for ends in ((near, self._far), (self._far, near)):
                ends[0].settimeout(_SEND_S)
                selector.register(ends[0], selectors.EVENT_READ, ends)
            while not self._ended():
                for ready, _ in selector.select(_LOOK_S):
                    source, sink = ready.data
                    data = source.recv(_PIECE)
                    if not data:
                        return
                    sink.sendall(data)
