# SPDX-License-Identifier: Apache-2.0
"""Waiting for many sockets at once, at a cost that does not grow with their number."""

from __future__ import annotations

import logging
import select
from collections.abc import Callable
from typing import TypeAlias

import zmq

Source: TypeAlias = "zmq.Socket[bytes] | int"

logger = logging.getLogger("llm_datadist_torch")


class Poller:
    """Calls readers of ZeroMQ sockets and descriptors when there is something to read.

    ``zmq.Poller`` looks at every socket each time. This one waits by epoll for the sockets'
    descriptors, and looks at those that are ready. A socket's descriptor says only that something
    has *changed* since the socket was used last: who uses one outside of its reader says so by
    :meth:`touch`.

    Thread safety: none; it belongs to the thread that calls :meth:`serve`.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sources: dict[int, Source] = {}
        self._descriptors: dict[Source, int] = {}
        self._readers: dict[Source, Callable[[], None]] = {}
        self._touched: set[zmq.Socket[bytes]] = set()

    def register(self, source: Source, reader: Callable[[], None]) -> None:
        """From now on call ``reader`` when this can be read."""
        descriptor = source if isinstance(source, int) else int(source.getsockopt(zmq.FD))
        self._epoll.register(descriptor, select.EPOLLIN)
        self._sources[descriptor], self._descriptors[source] = source, descriptor
        self._readers[source] = reader
        self.touch(source)

    def unregister(self, source: Source) -> None:
        """No more. To be called before the source is closed."""
        descriptor = self._descriptors.pop(source)
        del self._sources[descriptor], self._readers[source]
        self._epoll.unregister(descriptor)
        if not isinstance(source, int):
            self._touched.discard(source)

    def touch(self, source: Source) -> None:
        """It has been used: what has arrived may not show by its descriptor any more."""
        if not isinstance(source, int) and source in self._readers:
            self._touched.add(source)

    def serve(self, timeout_ms: int | None) -> None:
        """Wait until something can be read, at most so long, and call its readers, once each.

        Args:
            timeout_ms: None for ever.
        """
        for source in self._wait(timeout_ms):
            reader = self._readers.get(source)
            # A source that an earlier reader of this round has closed is no longer listed.
            if reader is None:
                continue
            self.touch(source)
            try:
                reader()
            except Exception:
                # One bad message or peer must not take the others' links down.
                logger.exception("error in the link thread")

    def _wait(self, timeout_ms: int | None) -> list[Source]:
        ready: dict[Source, None] = {s: None for s in self._touched if _can_be_read(s)}
        self._touched.clear()
        timeout = None if timeout_ms is None else timeout_ms / 1000
        for descriptor, _ in self._epoll.poll(0 if ready else timeout):
            source = self._sources[descriptor]
            if isinstance(source, int) or _can_be_read(source):
                ready[source] = None
        return list(ready)

    def close(self) -> None:
        """Wait for nothing any more. Idempotent."""
        self._epoll.close()


def _can_be_read(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
