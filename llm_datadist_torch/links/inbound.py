# SPDX-License-Identifier: Apache-2.0
"""The connections that others make to us: how many there may be, and how long without a link."""

from __future__ import annotations

import logging
import os
import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import zmq

from llm_datadist_torch.links.sockets import next_event
from llm_datadist_torch.links.timers import Timers

logger = logging.getLogger("llm_datadist_torch")

MAX_STRANGERS = 512
"""Connections without a link at a time; less where the process may open few descriptors."""
STRANGER_S = 10.0
"""How long a connection may be there without a link."""
STRANGER_BYTES = 4 << 20
"""How much may come on a connection before there is a link."""
_LOOK_S = 0.25
_COMPLAIN_S = 10.0
# Where struct tcp_info has tcpi_bytes_received (Linux 4.1): ZeroMQ keeps the parts of a message
# that never ends, and shows them to nobody.
_RECEIVED = slice(128, 136)


class Complaints:
    """Warnings about strangers: the first at once, then one per 10 s with how many there were."""

    def __init__(self) -> None:
        self._next = 0.0
        self._silent = 0

    def say(self, text: str) -> None:
        """Log it, or count it."""
        now = time.monotonic()
        if now < self._next:
            self._silent += 1
            return
        more = f" (and {self._silent} more complaints about strangers)" if self._silent else ""
        logger.warning("%s%s", text, more)
        self._next, self._silent = now + _COMPLAIN_S, 0


class Inbound:
    """The connections of a listening socket, by the descriptors that its monitor reports.

    ZeroMQ accepts whatever comes, until the process has no descriptors left, and keeps it. Here
    those that are no link make room for newer ones, the oldest first: who has come to link is done
    in milliseconds. A connection is ended by ``shutdown()``, which ZeroMQ takes for the peer's.

    Thread safety: none; it belongs to the endpoint's thread.

    Args:
        timers: Where to be called by from time to time.
        on_gone: Called with the identity of a connection that has ended, if it had said anything.

    Attributes:
        ports: Those that we listen on.
        complaints: What is said about strangers.
    """

    def __init__(self, timers: Timers, on_gone: Callable[[bytes], None]) -> None:
        self._timers = timers
        self._on_gone = on_gone
        self._monitor: zmq.Socket[bytes] | None = None
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = MAX_STRANGERS if soft < 0 else max(8, min(MAX_STRANGERS, soft // 4))
        # Two descriptors that are always there, for when there are no others.
        self._nothing = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            self._spare = os.dup(self._nothing)
        except OSError:
            os.close(self._nothing)
            raise
        self._since: dict[int, float] = {}
        self._descriptors: dict[bytes, int] = {}
        self._identities: dict[int, bytes] = {}
        self.ports: set[int] = set()
        self.complaints = Complaints()

    def listen_to(self, monitor: zmq.Socket[bytes]) -> None:
        """The listening socket has been made, and this tells of it."""
        self._monitor = monitor

    def read_events(self) -> None:
        """Take note of all that has happened to connections."""
        while self._monitor is not None and (told := next_event(self._monitor)) is not None:
            event, value = told
            if event == zmq.EVENT_ACCEPTED:
                self._add(value)
                while len(self._since) > self._most:
                    oldest = next(iter(self._since))
                    self._turn_away(oldest, f"there are more than {self._most} of them")
            elif event == zmq.EVENT_DISCONNECTED:
                self._gone(value)
            else:
                self.complaints.say("refused a connection: it failed to authenticate itself")

    def _add(self, descriptor: int) -> None:
        if not self._since:
            self._timers.set(self._look, [time.monotonic() + _LOOK_S])
        self._since[descriptor] = time.monotonic()

    def _gone(self, descriptor: int) -> None:
        self._since.pop(descriptor, None)
        identity = self._identities.pop(descriptor, None)
        if identity is not None:
            self._descriptors.pop(identity, None)
            self._on_gone(identity)

    def receive(self, listener: zmq.Socket[bytes]) -> tuple[bytes, list[bytes]]:
        """The next message: the identity of its connection, and its frames.

        Raises:
            zmq.Again: There is none.
        """
        identity = listener.recv(zmq.NOBLOCK)
        if identity in self._descriptors or not listener.getsockopt(zmq.RCVMORE):
            return identity, listener.recv_multipart(zmq.NOBLOCK)
        first = listener.recv(zmq.NOBLOCK, copy=False)
        rest = listener.recv_multipart(zmq.NOBLOCK) if first.more else []
        # What happened before: the descriptor may have been another connection's.
        self.read_events()
        try:
            descriptor = int(first.get(zmq.SRCFD))
        except zmq.ZMQError:
            # ZMTP 1 or 2, which none of us speaks.
            return identity, []
        if descriptor in self._since:
            self._descriptors[identity], self._identities[descriptor] = descriptor, identity
        return identity, [first.bytes, *rest]

    def keep(self, identity: bytes) -> bool:
        """A connection is a link now; whether it is still there."""
        descriptor = self._descriptors.get(identity)
        if descriptor is not None:
            self._since.pop(descriptor, None)
        return descriptor is not None

    def let_go(self, identity: bytes) -> None:
        """A connection is a link no more; its peer has a while to close it."""
        descriptor = self._descriptors.get(identity)
        if descriptor is not None and descriptor not in self._since:
            self._add(descriptor)

    def expel(self, identity: bytes, reason: str) -> None:
        """End a connection, whatever it is."""
        descriptor = self._descriptors.get(identity)
        if descriptor is not None:
            self._turn_away(descriptor, reason)

    def _look(self) -> None:
        end = time.monotonic() - STRANGER_S
        for descriptor, since in list(self._since.items()):
            if since <= end:
                self._turn_away(descriptor, f"it has not linked within {STRANGER_S:g} s")
            elif _received(descriptor) > STRANGER_BYTES:
                self._turn_away(descriptor, f"it has sent more than {STRANGER_BYTES} bytes")
        if self._since:
            self._timers.set(self._look, [time.monotonic() + _LOOK_S])

    def forget_all(self) -> None:
        """The listening socket is closed, and all its connections with it."""
        self._monitor = None
        self._since.clear()
        self._descriptors.clear()
        self._identities.clear()
        self.ports.clear()

    def close(self) -> None:
        """Give the spare descriptors back. Idempotent."""
        for descriptor in {self._spare, self._nothing} - {-1}:
            os.close(descriptor)
        self._spare = self._nothing = -1

    def _turn_away(self, descriptor: int, reason: str) -> None:
        self._since.pop(descriptor, None)
        self.complaints.say(f"a stranger's connection was ended: {reason}")
        # ZeroMQ may have closed it already, and the number be somebody else's: look at a copy,
        # which can't change meanwhile.
        with suppress(OSError):
            os.dup2(descriptor, self._spare, inheritable=False)
            copy = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=self._spare)
            try:
                if copy.getsockname()[1] in self.ports:
                    copy.shutdown(socket.SHUT_RDWR)
            finally:
                copy.detach()
                os.dup2(self._nothing, self._spare, inheritable=False)


def _received(descriptor: int) -> int:
    try:
        it = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=descriptor)
        try:
            info = it.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED.stop)
        finally:
            it.detach()
    except OSError:
        return 0
    return int.from_bytes(info[_RECEIVED], "little") if len(info) == _RECEIVED.stop else 0
