# SPDX-License-Identifier: Apache-2.0
"""What the `local` transports of two linked instances tell each other about device memory."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from llm_datadist_torch.transports.base import CacheVersion
from llm_datadist_torch.transports.local.ipc.runtime import KEY_BYTES

Address = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Key = Annotated[bytes, msgspec.Meta(min_length=1, max_length=KEY_BYTES - 1)]

_T = TypeVar("_T", bound=msgspec.Struct)


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """Asks for keys to the memory of the leased cache.

    Attributes:
        process: What the driver calls the process that asks.
    """

    process: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class SharedMemory(msgspec.Struct, frozen=True, array_like=True):
    """One allocation, by its key.

    Attributes:
        start: Its address in the owner's process.
        nbytes: Its size.
        key: What it is imported by.
        closed: Whoever was told the key increments the first of these counters once the memory is
            no longer open in its process, also if it never was. The owner frees it only then.
    """

    start: Address
    nbytes: Address
    key: Key
    closed: CacheVersion


class Shown(msgspec.Struct, frozen=True, array_like=True):
    """The answer to `Wanted`.

    Attributes:
        memory: The allocations that the cache lies in.
        reason: Why it can't be shared, with the remedy, so that asking again is useless; "" if it
            can.
    """

    memory: list[SharedMemory]
    reason: str = ""


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """The owner wants to free this memory: the receiver closes it as soon as nothing uses it."""

    memory: list[SharedMemory]


def encode(message: msgspec.Struct) -> bytes:
    """As bytes for `Relay.call`, its answer, and `Relay.post`."""
    return msgspec.msgpack.encode(message)


def decode(payload: bytes, kind: type[_T]) -> _T:
    """What a peer has said.

    Raises:
        msgspec.DecodeError: It is no message of this kind.
    """
    return msgspec.msgpack.decode(payload, type=kind)
