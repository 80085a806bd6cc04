# SPDX-License-Identifier: Apache-2.0
"""The ceiling between hosts: one TCP stream, as iperf has it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.peers import Call, Memory, Peer, Task

PULL, PUSH = b"<", b">"


class Stream(Peer):
    """As many bytes from one buffer into another, by one connection; it moves no blocks."""

    name = "TCP stream"
    option = "stream"
    role = "ceiling"
    hosts = (2,)
    moves_blocks = False

    @contextmanager
    def serve(self, memory: Memory) -> Iterator[Any]:
        with socket.create_server((memory.host, 0)) as listener:
            args = (listener, memory.shape.nbytes)
            thread = threading.Thread(target=answer, args=args, daemon=True)
            thread.start()
            yield listener.getsockname()
            thread.join(10)

    @contextmanager
    def mover(self, task: Task) -> Iterator[Call]:
        buffer = memoryview(bytearray(task.shape.nbytes))
        with socket.create_connection(task.offer) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def pull() -> None:
                sock.sendall(PULL)
                receive(sock, buffer)

            def push() -> None:
                sock.sendall(PUSH)
                sock.sendall(buffer)
                sock.recv(1)

            yield push if task.push else pull


def receive(sock: socket.socket, buffer: memoryview) -> None:
    """Fill a buffer."""
    there = 0
    while there < len(buffer):
        if not (count := sock.recv_into(buffer[there:])):
            raise ConnectionError("the other end of the stream has gone")
        there += count


def answer(listener: socket.socket, nbytes: int) -> None:
    """Send or receive so many bytes whenever the one connection asks, until it ends."""
    buffer = memoryview(bytearray(nbytes))
    sock, _ = listener.accept()
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while order := sock.recv(1):
            if order == PULL:
                sock.sendall(buffer)
            else:
                receive(sock, buffer)
                sock.sendall(order)
