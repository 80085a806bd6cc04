# SPDX-License-Identifier: Apache-2.0
"""Messages to fuzz with: whole ones, broken ones, and those that are none."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from llm_datadist_torch.serving import messages
from llm_datadist_torch.serving.messages import Envelope, encode
from llm_datadist_torch.transports.base import CacheVersion, RegionView

REGION = RegionView(1, 2**40, 4096, 5, 6, 7)
MEMBER = messages.MemberInfo(3, "life", "127.0.0.1", 1)
CORPUS: list[messages.Message] = [
    messages.Hello(3, 1, "life", False, {"local": b"x"}, "", "n", "l"),
    messages.Welcome(3, "life", {"local": b"x"}),
    messages.Refused(5010, "no"),
    messages.Resolve("blocks", 0, 0, True, False),
    messages.Resolve("request", 7, 1, None, True),
    messages.Resolve("id", 1, 0, None, True),
    messages.Resolve("address", 2**40, 0, None, False),
    messages.Release(1, (0, 2)),
    messages.ReadBytes(1, bytes(16)),
    messages.WriteBytes(1, bytes(32)),
    messages.Done(),
    messages.RegionFreed(1),
    messages.Join("token"),
    messages.Unlink(),
    messages.JoinMeeting("name", [(0, 1), (1, 2)], 1),
    messages.MeetingToken("token"),
    messages.EnterMeeting(MEMBER),
    messages.MeetingMembers([MEMBER, MEMBER]),
    messages.Question(b"why"),
    messages.Answer(b"so"),
]
"""One of each kind that a peer may send, to begin with."""
VERSION = CacheVersion(REGION, 8, 1, 2)

_ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, float("nan"), "", "id",
    "blocks", "x" * 300, b"", b"y" * 40, [], [1, 2], [[]], {}, {"local": b""}, {1: 2},
]  # fmt: skip


def deep(levels: int) -> bytes:
    return b"\x91" * levels + b"\xc0"


def broken(rng: random.Random) -> bytes:
    """A frame that was whole before something happened to it."""
    body = rng.choice(CORPUS)
    whole = encode(Envelope(rng.choice([0, 1, 2**32]), rng.random() < 0.2, body))  # type: ignore[arg-type]
    kind = rng.randrange(6)
    if kind == 0:
        return whole
    if kind == 1:
        return whole[: rng.randrange(len(whole))]
    if kind == 2:
        frame = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        return bytes(frame)
    if kind == 3:
        return rng.randbytes(rng.randrange(64))
    fields = msgspec.msgpack.decode(whole)
    part = fields[2] if kind == 4 else fields
    part[rng.randrange(len(part))] = rng.choice(_ODD)
    if rng.random() < 0.2:
        part.append(rng.choice(_ODD))
    return msgspec.msgpack.encode(fields)


def frames(rng: random.Random) -> list[bytes]:
    """The frames of one message, mostly one."""
    made = [broken(rng)]
    while rng.random() < 0.2:
        made.append(rng.randbytes(rng.choice([0, 1, 16, 32, 1000])))
    return made
