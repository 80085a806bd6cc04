# SPDX-License-Identifier: Apache-2.0
"""The sockets of one instance and the one thread that may touch them."""

from __future__ import annotations

import collections
import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from llm_datadist_torch.links.descriptors import FOR_A_LINK, lack_of_descriptors
from llm_datadist_torch.links.messages import Done, Envelope, decode, encode
from llm_datadist_torch.links.poller import Poller
from llm_datadist_torch.links.routes import Handler, Route, tcp_address
from llm_datadist_torch.links.sockets import (
    LOSS_EVENTS,
    bind_patiently,
    bound_port,
    new_context,
    new_dialer,
    new_listener,
    send_patiently,
)
from llm_datadist_torch.links.timers import Timers

logger = logging.getLogger("llm_datadist_torch")

_BURST = 64
"""Messages read from one socket before the others get their turn."""
_BEFORE_PROBE = 4096
"""Messages read from the listener before looking who is gone: hundreds may say goodbye at once."""
_REBIND_S = 1.0
"""How long a port that we have closed may still be busy: ZeroMQ does it in the background."""
_SEND_S = 0.1
"""How long a peer's full queue may take to have room, before it counts as not reading at all."""
_COMMAND_S = 5.0
"""Longest that a command waits for the thread."""
_PROBE_AFTER_S = (0.0, 0.01, 0.05, 0.25)
"""When to look which listener link a closed connection belonged to:

ZeroMQ drops its route a moment later.
"""


_T = TypeVar("_T")


class Endpoint:
    """The sockets of one instance.

    Thread safety: ``new_route``, ``connect``, ``send``, ``watch`` and ``drop`` may be called from
    any thread and don't block; they are carried out by the endpoint's thread, in order. ``start``
    and ``close`` belong to the instance's owner.

    Attributes:
        timers: What the thread does at certain times; the thread's alone once it runs.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._context = new_context()
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._poller = Poller()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._monitors: dict[int, zmq.Socket[bytes]] = {}
        self._numbers = itertools.count(1)
        self._watched: set[Route] = set()
        self._stuck: set[Route] = set()
        self.timers = Timers()
        self._extra_ports: dict[str, int] = {}
        self._running = True
        self._on_start: Callable[[], None] = lambda: None
        self._thread = threading.Thread(
            target=self._run, name="llm_datadist_torch.links", daemon=True
        )
        self.listen_address: tuple[str, int] | None = None

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
        self._poller.register(self._wake, self._carry_out)
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

        self._in_thread(carry_out)

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
        return self._in_thread(lambda: self._listen_on(host))

    def _in_thread(self, work: Callable[[], _T]) -> _T:
        done: Future[_T] = Future()

        def carry_out() -> None:
            try:
                done.set_result(work())
            except Exception as error:  # noqa: BLE001 (the caller gets it, whatever it is)
                done.set_exception(error)

        if not self._submit(carry_out):
            raise OSError(errno.ESHUTDOWN, "the instance has been finalized")
        # A command that close() came before is never carried out.
        wait([done], _COMMAND_S)
        if not done.done():
            raise OSError(errno.ETIMEDOUT, "the instance is being finalized")
        return done.result()

    def close(self) -> None:
        """Send what is queued, then close everything. Blocks for a moment; idempotent."""
        if self._thread.is_alive():
            self._submit(self._stop)
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
        self._submit(lambda: self._dial(route.socket, tcp_address(host, port)))

    def send(self, route: Route, envelope: Envelope, data: bytes | None = None) -> None:
        """Queue one message; if the route is dead, ``on_lost`` says so."""
        frames = [encode(envelope)] if data is None else [encode(envelope), data]
        if threading.current_thread() is self._thread:
            self._send(route, frames)
        else:
            self._submit(lambda: self._send(route, frames))

    def watch(self, route: Route) -> None:
        """Report the loss of this route of the listening socket."""
        self._submit(lambda: self._watched.add(route))

    def drop(self, route: Route) -> None:
        """Close the route (a listener's route is only forgotten: the peer closes it)."""
        self._submit(lambda: self._drop(route))

    # -- in the thread ----------------------------------------------------------------------------

    def _submit(self, command: Callable[[], None]) -> bool:
        # Under a lock, because the number of a closed descriptor soon belongs to somebody else.
        with self._wake_lock:
            if self._wake >= 0:
                self._commands.append(command)
                os.eventfd_write(self._wake, 1)
            return self._wake >= 0

    def _run(self) -> None:
        self._on_start()
        while self._running:
            self._poller.serve(self.timers.wait_ms())
            # After what has arrived: that a peer is silent shows only when all of it is read.
            self.timers.run_due()
        self._release()

    def _carry_out(self) -> None:
        os.eventfd_read(self._wake)
        try:
            while self._commands:
                self._commands.popleft()()
        finally:
            if self._commands:
                os.eventfd_write(self._wake, 1)

    def _receive(self, number: int, socket: zmq.Socket[bytes], most: int = _BURST) -> None:
        self._poller.touch(socket)
        for _ in range(most):
            if self._sockets.get(number) is not socket:
                return
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            identity = frames.pop(0) if number == 0 else b""
            try:
                envelope = decode(frames[0])
            except (msgspec.DecodeError, IndexError) as error:
                logger.warning("ignored %d malformed frame(s): %s", len(frames), error)
                continue
            data = frames[1] if len(frames) > 1 else None
            self._handler.on_message(Route(number, identity), envelope, data)

    def _on_event(self, monitor: zmq.Socket[bytes], number: int) -> None:
        event = zmq.Event(recv_monitor_message(monitor)["event"])
        if number == 0:
            now = time.monotonic()
            self.timers.set(self._probe, [now + after for after in _PROBE_AFTER_S])
            return
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._handler.on_connected(Route(number, b""))
            return
        # What the peer said before it went still counts.
        self._receive(number, self._sockets[number])
        if number not in self._sockets:
            return
        reason = {
            zmq.Event.CLOSED: "connection refused or unreachable",
            zmq.Event.DISCONNECTED: "the peer closed the connection",
        }.get(event, "the peer does not speak this protocol")
        self._lose(Route(number, b""), reason)

    def _dial(self, number: int, address: str) -> None:
        lack = lack_of_descriptors(FOR_A_LINK)
        if lack:
            self._lose(Route(number, b""), lack)
            return
        socket = new_dialer(self._context)
        self._add(number, socket, LOSS_EVENTS | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            self._lose(Route(number, b""), str(error))

    def _listen_on(self, host: str) -> int:
        if host not in self._extra_ports:
            address, listener = tcp_address(host, 0), self._sockets.get(0)
            socket = new_listener(self._context) if listener is None else listener
            try:
                socket.bind(address)
            except zmq.ZMQError as error:
                if listener is None:
                    socket.close()
                raise OSError(error.errno, f"can't listen on {host}: {error.strerror}") from error
            self._poller.touch(socket)
            if listener is None:
                self._add(0, socket, zmq.EVENT_DISCONNECTED)
            self._extra_ports[host] = bound_port(socket)
        return self._extra_ports[host]

    def _bind(self, host: str, port: int, *, patience_s: float = 0.0) -> None:
        address = tcp_address(host, port)
        socket = new_listener(self._context)
        try:
            bind_patiently(socket, address, patience_s)
        except zmq.ZMQError as error:
            socket.close()
            text = f"can't listen on {host}:{port}: {error.strerror}"
            raise OSError(error.errno, text) from error
        self._unbind()
        self._add(0, socket, zmq.EVENT_DISCONNECTED)
        self.listen_address = (host, bound_port(socket))

    def _unbind(self) -> None:
        self.listen_address = None
        self._extra_ports.clear()
        if 0 in self._sockets:
            self._close_socket(0)

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
        monitor = socket.get_monitor_socket(events)
        self._sockets[number], self._monitors[number] = socket, monitor
        self._poller.register(socket, lambda: self._receive(number, socket))
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
                self._watched.add(route)
                self._handler.on_stuck(route, "the peer does not read what is sent to it")
        except zmq.ZMQError as error:
            reason = (
                "connection closed" if error.errno == errno.EHOSTUNREACH else str(error.strerror)
            )
            self._lose(route, reason)

    def _probe(self) -> None:
        # What a peer said before it went still counts, a goodbye above all.
        if 0 in self._sockets:
            self._receive(0, self._sockets[0], _BEFORE_PROBE)
        for route in list(self._watched):
            self._send(route, [encode(Envelope(0, True, Done()))])

    def _lose(self, route: Route, reason: str) -> None:
        self._drop(route)
        self._stuck.discard(route)
        self._handler.on_lost(route, reason)

    def _drop(self, route: Route) -> None:
        self._watched.discard(route)
        if route.socket == 0:
            return
        if route.socket in self._sockets:
            self._close_socket(route.socket)

    def _close_socket(self, number: int) -> None:
        socket, monitor = self._sockets.pop(number), self._monitors.pop(number)
        for source in (socket, monitor):
            self._poller.unregister(source)
        socket.disable_monitor()
        # Not left to the garbage collector: a forgotten reference would block the context's end.
        monitor.close(0)
        socket.close()

    def _stop(self) -> None:
        self._running = False

    def _release(self) -> None:
        for number in list(self._sockets):
            self._close_socket(number)
        self._poller.close()
        self._context.term()
        with self._wake_lock:
            wake, self._wake = self._wake, -1
            self._commands.clear()
            if wake >= 0:
                os.close(wake)
