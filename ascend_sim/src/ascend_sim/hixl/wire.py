# SPDX-License-Identifier: Apache-2.0
"""Control messages between engines: JSON objects with their length in front."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

Message = dict[str, Any]

_LENGTH = struct.Struct("!I")
_MAX_BYTES = 64 << 20


class Deadline:
    """One instant until which a whole call may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self._end - time.monotonic())


def send(connection: socket.socket, message: Message) -> None:
    """Sends one message.

    Raises:
        OSError: the connection is closed, or its time limit is over.
    """
    data = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket, deadline: Deadline | None = None) -> Message:
    """Receives one message.

    Raises:
        TimeoutError: it did not come in time.
        OSError: the connection is closed, or what came is no message.
    """
    (length,) = _LENGTH.unpack(_receive_bytes(connection, _LENGTH.size, deadline))
    if length > _MAX_BYTES:
        raise OSError(f"a message of {length} bytes, limit {_MAX_BYTES}")
    try:
        message = json.loads(_receive_bytes(connection, length, deadline))
    except (ValueError, RecursionError) as error:
        raise OSError(f"what came is no message: {error}") from None
    if not isinstance(message, dict):
        raise OSError("what came is no message: not a JSON object")
    return message


def _receive_bytes(connection: socket.socket, count: int, deadline: Deadline | None) -> bytes:
    parts = []
    while count:
        if deadline is not None:
            left = deadline.left()
            if left == 0:
                raise TimeoutError("no answer in time")
            connection.settimeout(left)
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise ConnectionError("the connection was closed")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
