# SPDX-License-Identifier: Apache-2.0
"""The sockets of one instance and the one thread that may touch them."""

from __future__ import annotations

import collections
import errno
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import msgspec
import zmq

from llm_datadist_torch.links.auth import Doorkeeper, LinkKeys, warn_of_network
from llm_datadist_torch.links.commands import Commands
from llm_datadist_torch.links.descriptors import FOR_A_LINK, lack_of_descriptors
from llm_datadist_torch.links.inbound import Inbound
from llm_datadist_torch.links.messages import Done, Envelope, encode, parse
from llm_datadist_torch.links.poller import Poller
from llm_datadist_torch.links.routes import Handler, Route, tcp_address
from llm_datadist_torch.links.sockets import (
    INBOUND_EVENTS,
    LOSS_EVENTS,
    bind_patiently,
    bound_port,
    new_context,
    new_dialer,
    new_listener,
    new_monitor,
    next_event,
    send_patiently,
    why_lost,
)
from llm_datadist_torch.links.timers import Timers

_BURST = 64
"""Messages read from one socket before the others get their turn."""
_BEFORE_PROBE = 4096
"""Messages read from the listener before looking who is gone: hundreds may say goodbye at once."""
_REBIND_S = 1.0
"""How long a port that we have closed may still be busy: ZeroMQ does it in the background."""
_MALFORMED = 16
"""Messages that make no sense, after which a connection is ended."""
_SEND_S = 0.1
"""How long a peer's full queue may take to have room, before it counts as not reading at all."""
_PROBE_AFTER_S = (0.0, 0.01, 0.05, 0.25)
"""When to look whose a connection was that has ended: ZeroMQ drops its route a moment later."""


class Endpoint:
    """The sockets of one instance.

    Thread safety: ``new_route``, ``connect``, ``send``, ``watch`` and ``drop`` may be called from
    any thread and don't block; they are carried out by the endpoint's thread, in order. ``start``
    and ``close`` belong to the instance's owner.

    Args:
        handler: Who gets what arrives.
        keys: What both ends of a connection must have; None lets everybody in.

    Attributes:
        timers: What the thread does at certain times; the thread's alone once it runs.
    """

    def __init__(self, handler: Handler, keys: LinkKeys | None = None) -> None:
        self._handler = handler
        self._keys = keys
        self._malformed: collections.Counter[Route] = collections.Counter()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._monitors: dict[int, zmq.Socket[bytes]] = {}
        self._numbers = itertools.count(1)
        self._watched: set[Route] = set()
        self._suspects: set[Route] = set()
        self._stuck: set[Route] = set()
        self.timers = Timers()
        self._extra_ports: dict[str, int] = {}
        self._running = True
        self._on_start: Callable[[], None] = lambda: None
        self._thread = threading.Thread(
            target=self._run, name="llm_datadist_torch.links", daemon=True
        )
        self.listen_address: tuple[str, int] | None = None
        with ExitStack() as opened:
            self._commands = Commands()
            opened.callback(self._commands.close)
            self._context = new_context()
            opened.callback(self._context.term)
            self._inbound = Inbound(self.timers, self._on_gone)
            opened.callback(self._inbound.close)
            self._poller = Poller()
            opened.callback(self._poller.close)
            self._doorkeeper = None if keys is None else Doorkeeper(self._context, keys)
            if self._doorkeeper is not None:
                opened.callback(self._doorkeeper.socket.close)
            self._opened = opened.pop_all()

    # -- for the instance -------------------------------------------------------------------------

    def start(
        self, listen: tuple[str, int] | None, on_start: Callable[[], None] = lambda: None
    ) -> None:
        """Bind the listening socket, if any, and start the thread.

        Args:
            listen: Host text and port; port 0 takes a free one (see ``listen_address``).
            on_start: Called first in the thread; must not raise.

        Raises:
            ValueError: The host is no address.
            OSError: The address can't be bound.
        """
        if listen is not None:
            self._bind(*listen)
        self._poller.register(self._commands.descriptor, self._commands.carry_out)
        if self._doorkeeper is not None:
            self._poller.register(self._doorkeeper.socket, self._doorkeeper.serve)
        self._on_start = on_start
        self._thread.start()

    def relisten(self, listen: tuple[str, int] | None, check: Callable[[], None]) -> None:
        """Listen elsewhere, or not at all, without a gap in which a peer could come in between.

        Blocks until it is done. Must not overlap with ``close``.

        Args:
            listen: As for :meth:`start`; the address that it listens on already changes nothing.
            check: Called in the endpoint's thread right before; what it raises calls it all off.

        Raises:
            ValueError: The host is no address.
            OSError: The address can't be bound; it still listens where it did before.
        """

        def carry_out() -> None:
            check()
            self._relisten(listen)

        self._commands.call(carry_out)

    def listen_on(self, host: str) -> int:
        """Listen on one more address, until ``close`` or ``relisten``; blocks until it is done.

        Args:
            host: An address of this host.

        Returns:
            A port that it had free, the same whenever it is asked for this host.

        Raises:
            ValueError: The host is no address.
            OSError: The address can't be bound.
        """
        return self._commands.call(lambda: self._listen_on(host))

    def close(self) -> None:
        """Send what is queued, then close everything. Blocks for a moment; idempotent."""
        if self._thread.is_alive():
            self._commands.submit(self._stop)
            self._thread.join()
        elif self._running:
            self._stop()
            self._release()

    # -- for everybody ----------------------------------------------------------------------------

    def new_route(self) -> Route:
        """A route of its own for :meth:`connect`, to be known before anything can happen on it."""
        return Route(next(self._numbers), b"")

    def connect(self, route: Route, host: str, port: int) -> None:
        """Start to connect; what comes of it shows by an answer or by ``on_lost``."""
        self._commands.submit(lambda: self._dial(route.socket, tcp_address(host, port)))

    def send(self, route: Route, envelope: Envelope, data: bytes | None = None) -> None:
        """Queue one message; if the route is dead, ``on_lost`` says so."""
        frames = [encode(envelope)] if data is None else [encode(envelope), data]
        if threading.current_thread() is self._thread:
            self._send(route, frames)
        else:
            self._commands.submit(lambda: self._send(route, frames))

    def watch(self, route: Route) -> None:
        """Report the loss of this route of the listening socket."""
        self._commands.submit(lambda: self._watch(route))

    def drop(self, route: Route) -> None:
        """Close the route (a listener's route is only forgotten: the peer closes it)."""
        self._commands.submit(lambda: self._drop(route))

    # -- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        self._on_start()
        while self._running:
            self._poller.serve(self.timers.wait_ms())
            # After what has arrived: that a peer is silent shows only when all of it is read.
            self.timers.run_due()
        self._release()

    def _receive(self, number: int, socket: zmq.Socket[bytes], most: int = _BURST) -> None:
        self._poller.touch(socket)
        for _ in range(most):
            if self._sockets.get(number) is not socket:
                return
            try:
                if number == 0:
                    identity, frames = self._inbound.receive(socket)
                else:
                    identity, frames = b"", socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            route = Route(number, identity)
            try:
                envelope, data = parse(frames)
            except msgspec.DecodeError as error:
                self._complain(route, error)
            else:
                self._handler.on_message(route, envelope, data)

    def _complain(self, route: Route, error: Exception) -> None:
        self._inbound.complaints.say(f"ignored a malformed message: {error}")
        self._malformed[route] += 1
        if self._malformed[route] == _MALFORMED:
            if route.socket == 0:
                self._inbound.expel(route.identity, f"{_MALFORMED} malformed messages")
            else:
                self._lose(route, f"the peer has sent {_MALFORMED} malformed messages")

    def _on_gone(self, identity: bytes) -> None:
        route = Route(0, identity)
        self._malformed.pop(route, None)
        if route in self._watched:
            self._probe_soon(route)

    def _probe_soon(self, route: Route) -> None:
        self._suspects.add(route)
        self.timers.set(self._probe, [time.monotonic() + after for after in _PROBE_AFTER_S])

    def _on_event(self, monitor: zmq.Socket[bytes], number: int) -> None:
        self._poller.touch(monitor)
        told = next_event(monitor)
        if told is None:
            return
        event, value = told
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._handler.on_connected(Route(number, b""))
            return
        # What the peer said before it went still counts.
        self._receive(number, self._sockets[number])
        if number in self._sockets:
            secured = self._keys is not None
            self._lose(Route(number, b""), why_lost(event, value, secured=secured))

    def _dial(self, number: int, address: str) -> None:
        lack = lack_of_descriptors(FOR_A_LINK)
        if lack:
            self._lose(Route(number, b""), lack)
            return
        self._check_network(address)
        socket = new_dialer(self._context, self._keys)
        self._add(number, socket, LOSS_EVENTS | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            self._lose(Route(number, b""), str(error))

    def _listen_on(self, host: str) -> int:
        if host not in self._extra_ports:
            address, listener = tcp_address(host, 0), self._sockets.get(0)
            socket = new_listener(self._context, self._keys) if listener is None else listener
            try:
                socket.bind(address)
            except zmq.ZMQError as error:
                if listener is None:
                    socket.close()
                raise OSError(error.errno, f"can't listen on {host}: {error.strerror}") from error
            self._poller.touch(socket)
            if listener is None:
                self._add(0, socket, INBOUND_EVENTS)
            self._extra_ports[host] = bound_port(socket)
            self._inbound.ports.add(self._extra_ports[host])
            self._check_network(address)
        return self._extra_ports[host]

    def _bind(self, host: str, port: int, *, patience_s: float = 0.0) -> None:
        address = tcp_address(host, port)
        socket = new_listener(self._context, self._keys)
        try:
            bind_patiently(socket, address, patience_s)
        except zmq.ZMQError as error:
            socket.close()
            text = f"can't listen on {host}:{port}: {error.strerror}"
            raise OSError(error.errno, text) from error
        self._unbind()
        self._add(0, socket, INBOUND_EVENTS)
        self.listen_address = (host, bound_port(socket))
        self._inbound.ports.add(self.listen_address[1])
        self._check_network(address)

    def _check_network(self, address: str) -> None:
        if self._keys is None:
            warn_of_network(address)

    def _unbind(self) -> None:
        self.listen_address = None
        self._extra_ports.clear()
        if 0 in self._sockets:
            self._close_socket(0)
            self._inbound.forget_all()

    def _relisten(self, listen: tuple[str, int] | None) -> None:
        old = self.listen_address
        if listen is None:
            self._unbind()
        elif old is None or listen[1] != old[1]:
            self._bind(*listen)
        elif tcp_address(*listen) != tcp_address(*old):
            # One port on two addresses may overlap (0.0.0.0), so the old one must go first.
            self._unbind()
            try:
                self._bind(*listen, patience_s=_REBIND_S)
            except OSError:
                self._bind(*old, patience_s=_REBIND_S)
                raise

    def _add(self, number: int, socket: zmq.Socket[bytes], events: int) -> None:
        monitor = new_monitor(socket, events)
        self._sockets[number], self._monitors[number] = socket, monitor
        self._poller.register(socket, lambda: self._receive(number, socket))
        if number == 0:
            self._inbound.listen_to(monitor)
            self._poller.register(monitor, self._inbound.read_events)
        else:
            self._poller.register(monitor, lambda: self._on_event(monitor, number))

    def _send(self, route: Route, frames: list[bytes]) -> None:
        socket = self._sockets.get(route.socket)
        if socket is None:
            return
        self._poller.touch(socket)
        if route.socket == 0:
            frames = [route.identity, *frames]
        try:
            send_patiently(socket, frames, 0 if route in self._stuck else _SEND_S)
        except zmq.Again:
            # Once: a peer that never reads must not keep the others waiting again and again.
            if route not in self._stuck:
                self._stuck.add(route)
                self._watch(route)
                self._handler.on_stuck(route, "the peer does not read what is sent to it")
        except zmq.ZMQError as error:
            closed = error.errno == errno.EHOSTUNREACH
            self._lose(route, "connection closed" if closed else str(error.strerror))

    def _probe(self) -> None:
        # What a peer said before it went still counts, a goodbye above all.
        if 0 in self._sockets:
            self._receive(0, self._sockets[0], _BEFORE_PROBE)
        for route in list(self._suspects):
            self._send(route, [encode(Envelope(0, True, Done()))])

    def _lose(self, route: Route, reason: str) -> None:
        self._drop(route)
        self._stuck.discard(route)
        self._handler.on_lost(route, reason)

    def _watch(self, route: Route) -> None:
        self._watched.add(route)
        if route.socket == 0 and not self._inbound.keep(route.identity):
            self._probe_soon(route)

    def _drop(self, route: Route) -> None:
        self._watched.discard(route)
        self._suspects.discard(route)
        self._malformed.pop(route, None)
        if route.socket == 0:
            self._inbound.let_go(route.identity)
            return
        if route.socket in self._sockets:
            self._close_socket(route.socket)

    def _close_socket(self, number: int) -> None:
        socket, monitor = self._sockets.pop(number), self._monitors.pop(number)
        for source in (socket, monitor):
            self._poller.unregister(source)
        socket.monitor(None, 0)
        # Not left to the garbage collector: a forgotten reference would block the context's end.
        monitor.close(0)
        socket.close()

    def _stop(self) -> None:
        self._running = False

    def _release(self) -> None:
        for number in list(self._sockets):
            self._close_socket(number)
        self._opened.close()
