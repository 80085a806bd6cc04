# SPDX-License-Identifier: Apache-2.0
"""How messages and the opening of a connection look on the wire."""

from __future__ import annotations

import struct
from typing import NamedTuple

MAX_FRAME_BYTES = 8 << 20
"""Of a message, and of the data that follows it. Relayed bytes come in pieces of 4 MiB."""

WIRE_VERSION = 7
"""Of the messages. It changes with them, also between two releases of the library."""

_MAGIC = b"LLMDDT\n"
_MAX_VERSION_BYTES = 64
_HEADER = struct.Struct("<II")
_NO_DATA = 0xFFFFFFFF

HEADER_BYTES = _HEADER.size


class Unreadable(Exception):  # noqa: N818  (it is no error of ours)
    """What the peer sent can't be read; the connection has to end."""


def header(message: bytes, data: bytes | memoryview | None) -> bytes:
    """The header of a message, which may be followed by data."""
    return _HEADER.pack(len(message), _NO_DATA if data is None else len(data))


class Sizes(NamedTuple):
    """What a header announces.

    Attributes:
        message: Bytes of the message.
        data: Bytes of the data behind it; -1 for none.
    """

    message: int
    data: int

    @property
    def total(self) -> int:
        """Bytes of the whole, with the header."""
        return HEADER_BYTES + self.message + max(0, self.data)


def parse_header(buffer: memoryview, at: int) -> Sizes:
    """The sizes that the header at an offset of the buffer announces.

    Raises:
        Unreadable: They are larger than any message is.
    """
    message, data = _HEADER.unpack_from(buffer, at)
    data = -1 if data == _NO_DATA else data
    if message > MAX_FRAME_BYTES or data > MAX_FRAME_BYTES:
        raise Unreadable(f"a frame of {max(message, data)} bytes, at most {MAX_FRAME_BYTES} may be")
    return Sizes(message, data)


class Preamble(NamedTuple):
    """What each side sends first, as soon as the connection is there, in plain text.

    Attributes:
        secured: Whether the sender has a ``link_secret``; then TLS follows.
        version: The sender's version of this library, and of its messages.
    """

    secured: bool
    version: str

    def encode(self) -> bytes:
        """Its bytes."""
        text = self.version.encode()
        return _MAGIC + bytes([self.secured, len(text)]) + text

    @classmethod
    def parse(cls, buffer: memoryview) -> tuple[Preamble, int] | None:
        """The preamble at the beginning of a buffer, and its size; None while more must come.

        Raises:
            Unreadable: It is none.
        """
        start = bytes(buffer[: len(_MAGIC)])
        if start != _MAGIC[: len(start)]:
            raise Unreadable("the peer does not speak this protocol")
        fixed = len(_MAGIC) + 2
        if len(buffer) < fixed:
            return None
        secured, size = buffer[len(_MAGIC)], buffer[len(_MAGIC) + 1]
        if secured > 1 or size > _MAX_VERSION_BYTES:
            raise Unreadable("the peer does not speak this protocol")
        if len(buffer) < fixed + size:
            return None
        version = bytes(buffer[fixed : fixed + size]).decode("ascii", "replace")
        return cls(bool(secured), version), fixed + size
