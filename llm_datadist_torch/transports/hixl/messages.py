# SPDX-License-Identifier: Apache-2.0
"""What the `hixl` transports of two linked instances tell each other over the control connection.

A HIXL connection reaches what both engines had registered when it was made. Each side numbers its
registrations, and tells its peers of them, so that a peer knows whether its connection is recent
enough for a movement.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from llm_datadist_torch.transports.hixl.ranges import RegisteredRange


class HixlOffer(msgspec.Struct, frozen=True, array_like=True):
    """Part of the handshake.

    Attributes:
        engine: The address of the engine, spelt as HIXL wants to hear it.
    """

    engine: str


class Query(msgspec.Struct, frozen=True, array_like=True, tag="query"):
    """Wants a whole `Registered`, and every later change."""


class Registered(msgspec.Struct, frozen=True, array_like=True, tag="registered"):
    """What is registered with the sender's engine; nobody needs to stay disconnected any more.

    Attributes:
        generation: Number of the sender's latest registration.
        ranges: The ranges.
        whole: These are all ranges; else they come to those told of before.
    """

    generation: int
    ranges: list[RegisteredRange]
    whole: bool


class Disconnect(msgspec.Struct, frozen=True, array_like=True, tag="disconnect"):
    """The sender must deregister memory, which HIXL refuses while anybody is connected.

    The receiver ends its connection and makes none before a whole `Registered` comes.
    """


class Disconnected(msgspec.Struct, frozen=True, array_like=True, tag="disconnected"):
    """The answer to `Disconnect`, once it is done."""


Message: TypeAlias = Query | Registered | Disconnect | Disconnected
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """As bytes for `Relay.post`."""
    return msgspec.msgpack.encode(message)


def decode(payload: bytes) -> Message:
    """What a peer has said.

    Raises:
        msgspec.DecodeError: It is none of the messages.
    """
    return _decoder.decode(payload)
