# SPDX-License-Identifier: Apache-2.0
"""The ZeroMQ sockets of an endpoint: how they are set up, and what ends a connection."""

from __future__ import annotations

import ctypes
import errno
import itertools
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import zmq
from zmq.utils.monitor import parse_monitor_message

from llm_datadist_torch.links.auth import LinkKeys, why_no_connection
from llm_datadist_torch.links.messages import MAX_MESSAGE_BYTES

_LINGER_MS = 200
_SEND_RETRY_S = 0.001
_BIND_RETRY_S = 0.005
_RECEIVE_QUEUE, _SEND_QUEUE = 64, 128
"""Messages of one connection that may wait here, so that nobody can fill the memory.

Who sends faster than they are read is slowed down by TCP; who does not read is lost.
"""
_KEEPALIVE_S = {zmq.TCP_KEEPALIVE_IDLE: 10, zmq.TCP_KEEPALIVE_INTVL: 5, zmq.TCP_KEEPALIVE_CNT: 6}
_UNACKNOWLEDGED_MS = 40_000

_RAND_STATE_BYTES = 128
_rand_lock = threading.Lock()
_monitor_numbers = itertools.count()
_MAX_SOCKETS = 3 * 4096 + 16
"""ZeroMQ's own limit is 1023: a link that we dial takes 3, those that peers dial share one.

Its table of them takes 12 bytes each.
"""

LOSS_EVENTS = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
"""What a connecting socket's monitor reports when there is no connection, or no more."""
INBOUND_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
"""What is of interest about a listening socket."""
_HANDSHAKE_MS = 10_000
"""How long a connection may take until both sides have authenticated each other."""


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context with room for thousands of links."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
    return context


def new_dialer(context: zmq.Context[zmq.Socket[bytes]], keys: LinkKeys | None) -> zmq.Socket[bytes]:
    """A socket that is connected once, to somebody who has the same keys."""
    socket = _new_socket(context, zmq.DEALER)
    # No reconnection behind our back: a message must never reach a later process at the same
    # address.
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    if keys is not None:
        keys.secure_dialer(socket)
    return socket


def new_listener(
    context: zmq.Context[zmq.Socket[bytes]], keys: LinkKeys | None
) -> zmq.Socket[bytes]:
    """A socket that many with the same keys connect to; sending to one that is gone is an error."""
    with _unforeseeable_rand():
        socket = _new_socket(context, zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    if keys is not None:
        keys.secure_listener(socket)
    return socket


@contextmanager
def _unforeseeable_rand() -> Iterator[None]:
    """What C's rand() gives meanwhile nobody can know; afterwards it goes on as if nothing was.

    A ROUTER counts its connections from a number that it gets there, the same in every process that
    has not seeded it (libzmq 4.3.5). A stranger who calls himself by the number that is next aborts
    the process.
    """
    libc = ctypes.CDLL(None)
    libc.initstate.restype = libc.setstate.restype = ctypes.c_void_p
    state = ctypes.create_string_buffer(_RAND_STATE_BYTES)
    with _rand_lock:
        before = libc.initstate(ctypes.c_uint(secrets.randbits(32)), state, _RAND_STATE_BYTES)
        try:
            yield
        finally:
            libc.setstate(ctypes.c_void_p(before))


def new_monitor(socket: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """A socket that tells of these events of another."""
    address = f"inproc://llm_datadist_torch.monitor.{next(_monitor_numbers)}"
    socket.monitor(address, events)
    monitor: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR)
    monitor.setsockopt(zmq.LINGER, 0)
    # Without a limit: where it is full ZeroMQ's thread waits with a lock held that we may need.
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.connect(address)
    return monitor


def next_event(monitor: zmq.Socket[bytes]) -> tuple[int, int] | None:
    """The next event and its number, a descriptor or an error; None if there is none."""
    try:
        event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
    except zmq.Again:
        return None
    return int(event["event"]), event["value"]


def why_lost(event: int, value: int, *, secured: bool) -> str:
    """What to say of a dialer's connection that is not there, or no more.

    Args:
        event: One of ``LOSS_EVENTS``.
        value: The event's number.
        secured: Whether we have a secret.
    """
    if event == zmq.EVENT_CLOSED:
        return "connection refused or unreachable"
    if event == zmq.EVENT_DISCONNECTED:
        return "the peer closed the connection"
    return why_no_connection(event, value, secured=secured)


def bound_port(socket: zmq.Socket[bytes]) -> int:
    """The port that was bound last."""
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def bind_patiently(socket: zmq.Socket[bytes], address: str, patience_s: float) -> None:
    """Bind a socket to an address, which may still be busy for so long.

    Raises:
        zmq.ZMQError: It can't be bound.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                raise
        else:
            return
        time.sleep(_BIND_RETRY_S)


def send_patiently(socket: zmq.Socket[bytes], frames: list[bytes], patience_s: float) -> None:
    """Send a message, which a full queue may delay for so long.

    Raises:
        zmq.Again: The queue is still full.
        zmq.ZMQError: It can't be sent.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            if time.monotonic() >= end:
                raise
        else:
            return
        time.sleep(_SEND_RETRY_S)


def _new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, _SEND_QUEUE)
    socket.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE)
    # A host that has vanished ends the connection, and with it the leases that a lost peer held.
    # A process that is only stopped does not: its kernel answers.
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    for option, value in _KEEPALIVE_S.items():
        socket.setsockopt(option, value)
    socket.setsockopt(zmq.TCP_MAXRT, _UNACKNOWLEDGED_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    return socket
