# SPDX-License-Identifier: Apache-2.0
"""All connections of one instance, and the sockets that it listens on."""

from __future__ import annotations

import errno
import os
import socket
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import msgspec

from llm_datadist_torch.net import unix
from llm_datadist_torch.net.addresses import resolve, warn_of_network
from llm_datadist_torch.net.connection import Connection, Data, ReadBuffer, set_tcp_options
from llm_datadist_torch.net.descriptors import FOR_A_LINK, lack_of_descriptors
from llm_datadist_torch.net.framing import WIRE_VERSION, Preamble
from llm_datadist_torch.net.loop import READ, Loop
from llm_datadist_torch.net.strangers import STRANGER_BYTES, Strangers
from llm_datadist_torch.net.tls import LinkKeys

_BACKLOG = 1024
_ACCEPTS = 64
"""Connections that are accepted before the others get their turn."""
_NO_ACCEPT_S = 0.1
"""How long nobody is accepted after the process has run out of descriptors."""
_MALFORMED = 16
"""Messages that make no sense, after which a connection is ended."""
_TRIES, _AGAIN_S = 5, 0.01
"""How often, and after what pause first, a connection is dialed again that was turned away."""
_ANY_HOST = ("0.0.0.0", "::")  # noqa: S104
_LINGER_S = 0.2
"""How long a connection that is dropped may take to send what is queued."""

_endpoints: weakref.WeakSet[Endpoint] = weakref.WeakSet()


class Handler(Protocol):
    """Receives the events. All calls come from the I/O thread and must not block."""

    def on_message(self, connection: Connection, message: memoryview, data: Data | None) -> None:
        """A message has come, in memory that is used again when this returns.

        Raises:
            msgspec.DecodeError: It makes no sense.
        """

    def on_connected(self, connection: Connection) -> None:
        """A connection that we have dialed is up, to a peer with our version and our secret."""

    def on_lost(self, connection: Connection, reason: str) -> None:
        """The connection has ended or never came about."""


@dataclass(eq=False)
class MeetingListener:
    """A listener for the members of communicators, besides the instance's own.

    Attributes:
        sock: The socket; None where the instance listens there anyway.
        users: How often it has been opened.
    """

    sock: socket.socket | None
    users: int = 0


class Endpoint:
    """The connections of one instance.

    Thread safety: ``connect``, ``keep`` and ``drop`` may be called from any thread and don't block;
    they are carried out by the I/O thread, in order. ``start`` and ``close`` belong to the
    instance's owner.

    Args:
        handler: Receives the events.
        version: Of this library: peers with another one are refused.
        keys: What both ends of a connection must have; None lets everybody in.

    Attributes:
        listen_address: Host text and port that it listens on; None if it does not.
        loop: Its I/O thread.
    """

    def __init__(self, handler: Handler, version: str, keys: LinkKeys | None = None) -> None:
        self._handler = handler
        self.keys = keys
        self.preamble = Preamble(keys is not None, f"{version}/{WIRE_VERSION}")
        self.buffer = ReadBuffer()
        self.listen_address: tuple[str, int] | None = None
        self._connections: set[Connection] = set()
        self._introduced: dict[bytes, Connection] = {}
        self._listeners: list[socket.socket] = []
        self._extra_ports: dict[str, int] = {}
        self._meeting_listeners: dict[tuple[str, int], MeetingListener] = {}
        self._unix: socket.socket | None = None
        self.loop = Loop()
        try:
            self._strangers = Strangers(self.loop.timers)
        except OSError:
            self.loop.close()
            raise
        _endpoints.add(self)

    # -- for the instance -------------------------------------------------------------------------

    def start(
        self, listen: tuple[str, int] | None, on_start: Callable[[], None] = lambda: None
    ) -> None:
        """Bind the listening socket, if any, and start the thread.

        Args:
            listen: Host text and port; port 0 takes a free one (see ``listen_address``).
            on_start: Called first in the thread; must not raise.

        Raises:
            ValueError: The host is not an address.
            OSError: The address can't be bound.
        """
        if listen is not None:
            self._listen(*listen)
        self.loop.start(on_start, self._release)

    def relisten(self, listen: tuple[str, int] | None, check: Callable[[], None]) -> None:
        """Listen elsewhere, or not at all, without a gap in which a peer could come in between.

        Blocks until it is done. Must not overlap with ``close``.

        Args:
            listen: As for :meth:`start`; the address that it listens on already changes nothing.
            check: Called in the I/O thread right before; what it raises calls it all off.

        Raises:
            ValueError: The host is not an address.
            OSError: The address can't be bound; it still listens where it did before.
        """

        def carry_out() -> None:
            check()
            self._relisten(listen)

        self.loop.call(carry_out)

    def listen_on(self, host: str) -> int:
        """Listen on an address, until ``close`` or ``relisten``; blocks until it is done.

        Args:
            host: An address of this host.

        Returns:
            The port that it listens on there, if it does already; else one that was free.

        Raises:
            ValueError: The host is not an address.
            OSError: The address can't be bound.
        """
        return self.loop.call(lambda: self._listen_on(host))

    def open_listener(self, host: str, port: int) -> None:
        """Listen at this very address, too, until ``close_listener``; blocks until it is done.

        It can be opened several times, and stays until it has been closed as often.

        Args:
            host: An address of this host.
            port: Not 0.

        Raises:
            ValueError: The host is not an address.
            OSError: The address can't be bound.
        """
        self.loop.call(lambda: self._open_listener(host, port))

    def close_listener(self, host: str, port: int) -> None:
        """Listen there no more; connections that have been made there stay. Does not block."""
        self.loop.submit(lambda: self._close_listener(host, port))

    def close(self) -> None:
        """Send what is queued, then close everything. Blocks for a moment; idempotent."""
        if not self.loop.started:
            self._release()
        self.loop.close()

    # -- for everybody ----------------------------------------------------------------------------

    def new_connection(self) -> Connection:
        """A connection for :meth:`connect`, to be known before anything can happen on it."""
        return Connection(self, dialed=True)

    def connect(self, connection: Connection, host: str, port: int) -> None:
        """Start to connect; what comes of it shows by an answer or by ``on_lost``."""
        self.loop.submit(lambda: self._dial(connection, host, port))

    def keep(self, connection: Connection) -> None:
        """The connection is a link now."""
        self.loop.run(lambda: self._keep(connection))

    def drop(self, connection: Connection) -> None:
        """The connection is a link no more.

        One that we have dialed is closed as soon as what is queued has been sent. One that was
        accepted is closed by the peer, or, after a while, by us.
        """
        self.loop.run(lambda: self._drop(connection))

    # -- the host of the connections --------------------------------------------------------------

    def on_open(self, connection: Connection) -> None:
        """See :class:`~llm_datadist_torch.net.connection.Host`."""
        if not connection.dialed:
            self._strangers.prove(connection)
            introduction = unix.introduce(self._unix)
            connection.nonces = introduction.asked, introduction.answer
            self._introduced[introduction.asked] = connection
            connection.send(msgspec.msgpack.encode(introduction))

    def on_message(self, connection: Connection, message: memoryview, data: Data | None) -> None:
        """See :class:`~llm_datadist_torch.net.connection.Host`."""
        if connection.opening:
            self._on_introduction(connection, message)
            return
        try:
            self._handler.on_message(connection, message, data)
        except msgspec.DecodeError as error:
            self._complain(connection, error)
        if not connection.kept and connection.received > STRANGER_BYTES:
            self._strangers.turn_away(connection, f"it has sent more than {STRANGER_BYTES} bytes")

    def on_end(self, connection: Connection, reason: str) -> None:
        """See :class:`~llm_datadist_torch.net.connection.Host`."""
        if connection.opening and connection.was_reset and connection.tries < _TRIES:
            # A listener with too many strangers has turned us away.
            connection.start_again()
            again = time.monotonic() + _AGAIN_S * 2**connection.tries
            self.loop.timers.set(lambda: self._dial_again(connection), [again])
            return
        self._forget(connection)
        self._handler.on_lost(connection, reason)

    def complain(self, text: str) -> None:
        """See :class:`~llm_datadist_torch.net.connection.Host`."""
        self._strangers.complaints.say(text)

    def _on_introduction(self, connection: Connection, message: memoryview) -> None:
        try:
            introduction = msgspec.msgpack.decode(message, type=unix.Introduction)
        except (msgspec.DecodeError, ValueError) as error:
            connection.end(f"the peer does not introduce itself: {error}")
            return
        connection.opening = False

        def done() -> None:
            if not connection.closed:
                self._handler.on_connected(connection)

        unix.connect(self.loop, connection, introduction, done)

    def _complain(self, connection: Connection, error: Exception) -> None:
        self._strangers.complaints.say(f"ignored a malformed message: {error}")
        connection.malformed += 1
        if connection.malformed == _MALFORMED:
            connection.end(f"the peer has sent {_MALFORMED} malformed messages")

    # -- in the thread ----------------------------------------------------------------------------

    def _dial(self, connection: Connection, host: str, port: int) -> None:
        self._connections.add(connection)
        lack = lack_of_descriptors(FOR_A_LINK)
        if lack:
            connection.end(lack)
            return
        family, address = resolve(host, port)
        self._check_network(address[0])
        connection.target = family, address
        connection.dial(family, address)

    def _dial_again(self, connection: Connection) -> None:
        if connection in self._connections:
            connection.dial(*connection.target)

    def _keep(self, connection: Connection) -> None:
        connection.kept = True
        self._strangers.discard(connection)

    def _drop(self, connection: Connection) -> None:
        if connection.closed:
            self._forget(connection)
        elif not connection.dialed:
            connection.kept = False
            connection.received = 0
            self._strangers.add(connection)
        else:
            connection.finish()
            if connection.closed:
                self._forget(connection)
            else:
                end = time.monotonic() + _LINGER_S
                self.loop.timers.set(lambda: self._close(connection), [end])

    def _close(self, connection: Connection) -> None:
        connection.close()
        self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._strangers.discard(connection)
        self._introduced.pop(connection.nonces[0], None)

    def _check_network(self, host: str) -> None:
        if self.keys is None:
            warn_of_network(host)

    # -- listening --------------------------------------------------------------------------------

    def _listen_on(self, host: str) -> int:
        if self.listen_address is not None and self.listen_address[0] in (host, *_ANY_HOST):
            return self.listen_address[1]
        if host not in self._extra_ports:
            extra = self._open(host, 0)
            self._listeners.append(extra)
            self._extra_ports[host] = extra.getsockname()[1]
        return self._extra_ports[host]

    def _open_listener(self, host: str, port: int) -> None:
        listener = self._meeting_listeners.get((host, port))
        if listener is None:
            hosts = (host, *_ANY_HOST)
            listens = self.listen_address in [(each, port) for each in hosts]
            listener = MeetingListener(None if listens else self._open(host, port))
            self._meeting_listeners[host, port] = listener
        listener.users += 1

    def _close_listener(self, host: str, port: int) -> None:
        listener = self._meeting_listeners.get((host, port))
        if listener is None:
            return
        listener.users -= 1
        if listener.users == 0:
            del self._meeting_listeners[host, port]
            self._close_socket(listener.sock)

    def _close_socket(self, sock: socket.socket | None) -> None:
        if sock is not None:
            self.loop.remove(sock.fileno())
            sock.close()

    def _listen(self, host: str, port: int) -> None:
        """Listen here, and nowhere else any more."""
        new = self._open(host, port)
        self._unlisten()
        self._listeners.append(new)
        self.listen_address = (host, new.getsockname()[1])

    def _open(self, host: str, port: int) -> socket.socket:
        family, address = resolve(host, port)
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            text = f"can't listen on {host}:{port}: {error.strerror}"
            raise OSError(error.errno, text) from error
        self._check_network(address[0])
        if self._unix is None and (local := unix.listen()) is not None:
            self._unix = local
            self.loop.add(local.fileno(), READ, lambda _: self._accept(local, self._on_unix))
        self.loop.add(sock.fileno(), READ, lambda _: self._accept(sock, self._on_tcp))
        return sock

    def _unlisten(self) -> None:
        self.listen_address = None
        self._extra_ports.clear()
        for listener in self._listeners:
            self._close_socket(listener)
        self._listeners.clear()
        for stranger in self._strangers.all():
            self._strangers.discard(stranger)
            stranger.turn_away("this instance listens here no more")

    def _relisten(self, listen: tuple[str, int] | None) -> None:
        old = self.listen_address
        if listen is None:
            self._unlisten()
        elif old is None or listen[1] != old[1]:
            self._listen(*listen)
        elif resolve(*listen) != resolve(*old):
            # One port on two addresses may overlap (0.0.0.0), so the old one must go first.
            self._unlisten()
            try:
                self._listen(*listen)
            except OSError:
                self._listen(*old)
                raise

    def _accept(
        self, listener: socket.socket, on_accepted: Callable[[socket.socket], None]
    ) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                if not self._strangers.end_oldest("no descriptor is left for newer ones"):
                    self._rest_from(listener)
                    return
            else:
                sock.setblocking(False)
                on_accepted(sock)

    def _rest_from(self, listener: socket.socket) -> None:
        """Accept nobody for a moment: there is no descriptor, and they would be tried for ever."""
        self.loop.watch_for(listener.fileno(), 0)

        def go_on() -> None:
            if listener.fileno() >= 0:
                self.loop.watch_for(listener.fileno(), READ)

        self.loop.timers.set(go_on, [time.monotonic() + _NO_ACCEPT_S])

    def _on_tcp(self, sock: socket.socket) -> None:
        set_tcp_options(sock)
        connection = Connection(self, dialed=False)
        self._connections.add(connection)
        connection.start(sock)
        self._strangers.add(connection)

    def _on_unix(self, sock: socket.socket) -> None:
        self._strangers.add(unix.Proof(self.loop, sock, self._on_nonce))

    def _on_nonce(self, proof: unix.Proof, nonce: bytes) -> None:
        """A peer asks to move its connection to a Unix socket."""
        self._strangers.discard(proof)
        connection = self._introduced.pop(nonce, None)
        if connection is None or connection.closed or connection.process is not None:
            proof.end()
            return
        if not proof.give(connection.nonces[1]):
            proof.end()
            return
        proof.accept(connection)

    # -- the end ----------------------------------------------------------------------------------

    def _release(self) -> None:
        for connection in list(self._connections):
            connection.linger(_LINGER_S)
        self._unlisten()
        for connection in list(self._connections):
            self._close(connection)
        for listener in self._meeting_listeners.values():
            self._close_socket(listener.sock)
        self._meeting_listeners.clear()
        local, self._unix = self._unix, None
        self._close_socket(local)

    def forget(self) -> None:
        """Close all descriptors in a forked child, without a word to the peers."""
        for connection in list(self._connections):
            connection.forget()
        meetings = [listener.sock for listener in self._meeting_listeners.values()]
        for listener in (*self._listeners, *meetings, self._unix):
            if listener is not None:
                with suppress(OSError):
                    listener.close()
        self.loop.forget()


def _forget_in_child() -> None:
    for endpoint in list(_endpoints):
        endpoint.forget()


os.register_at_fork(after_in_child=_forget_in_child)
