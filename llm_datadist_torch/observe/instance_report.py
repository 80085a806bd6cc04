# SPDX-License-Identifier: Apache-2.0
"""``InstanceReport``: what an instance tells a linked peer that examines it, such as ``doctor``."""

from __future__ import annotations

import msgspec


class ProbeCache(msgspec.Struct, frozen=True):
    """A blocks cache that the peer may pull from, to measure how fast bytes arrive.

    Attributes:
        model_id: The ``model_id`` of its key.
        cache_id: Its id.
        tensors: Number of tensors.
        blocks: Blocks of each.
        block_bytes: Bytes of one block in one tensor.
        device: Where it is.
    """

    model_id: int
    cache_id: int
    tensors: int
    blocks: int
    block_bytes: int
    device: str


class Limits(msgspec.Struct, frozen=True):
    """What the system lets a process have; None without a limit.

    Attributes:
        open_files: Descriptors (``ulimit -n``).
        locked_bytes: Bytes of locked memory (``ulimit -l``).
        memory_bytes: Bytes of memory and swap of its control group.
    """

    open_files: int | None
    locked_bytes: int | None
    memory_bytes: int | None


class SeenChoice(msgspec.Struct, frozen=True):
    """Which transport one side of a link uses for one kind of memory.

    Attributes:
        memory: "host" or "device".
        transport: Its name; None where none can.
        reason: Why this one, or why none.
    """

    memory: str
    transport: str | None
    reason: str


class InstanceReport(msgspec.Struct, frozen=True):
    """An instance as it describes itself, and the link to the peer that asks as it sees it.

    Attributes:
        cluster_id: Its id.
        pid: Its process, in its own PID namespace.
        host: Its host's name.
        versions: What is installed there.
        device: What ``Placement.DEVICE`` means there.
        listen: Where it listens, "" for nowhere.
        secured: Whether it has a ``link_secret``.
        transports: Transports that it has, preferred ones first.
        unavailable: Why it does not have the others, by name.
        choices: What it uses on this link.
        not_local: Why it does not take the peer for one on its host; "" where it does.
        limits: What its process may have.
        dial_back: Why it can't connect to the port of the peer that it was told of; "" where it
            can, None where it did not try: it was told of no port, or the link has no address.
        probe: A cache that may be pulled from; None where it has no cache with a name.
    """

    cluster_id: int
    pid: int
    host: str
    versions: dict[str, str]
    device: str
    listen: str
    secured: bool
    transports: tuple[str, ...]
    unavailable: dict[str, str]
    choices: tuple[SeenChoice, ...]
    not_local: str
    limits: Limits
    dial_back: str | None
    probe: ProbeCache | None
