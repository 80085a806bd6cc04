# SPDX-License-Identifier: Apache-2.0
"""``ServedPeer``: what an owner knows of a peer that uses its caches."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum

from llm_datadist_torch import _C
from llm_datadist_torch.caches.entry import CacheEntry, KeyName
from llm_datadist_torch.memory.region import Region
from llm_datadist_torch.net.connection import Connection
from llm_datadist_torch.transports.choice import LinkChannel


class LinkState(Enum):
    """Where a link stands. A lost link stays listed until it is relinked or unlinked."""

    LINKED = "linked"
    LOST = "lost"
    UNLINKED = "unlinked"


@dataclass(frozen=True)
class Grant:
    """A lease that the peer holds: on which cache, and which key a complete pull of it consumes."""

    lease: _C.Lease[CacheEntry]
    entry: CacheEntry
    consumes: KeyName | None
    write: bool


@dataclass(eq=False)
class ServedPeer(ABC):
    """The owner's side of a link: which peer it is, and what it uses of ours.

    ``grants`` and ``state`` change only in the I/O thread or while transfers are stopped.

    Attributes:
        peer: The peer's cluster id.
        epoch: The peer's life: another epoch under the same id is another process.
        connection: The connection that its messages use.
        name: Random name of the link, which both sides know.
        state: Where the link stands.
        grants: Leases that the peer holds on our caches.
        begun: Keys that the peer has begun to pull and not consumed, and their caches.
        shown_regions: Our regions that the peer was told of, and may have mapped, by id.
        leaving: This side is about to end the link: the peer gets no more leases.
    """

    peer: int
    epoch: str
    connection: Connection
    name: str = field(default="", kw_only=True)
    state: LinkState = field(default=LinkState.LINKED, kw_only=True)
    grants: dict[int, Grant] = field(default_factory=dict, kw_only=True)
    begun: dict[KeyName, CacheEntry] = field(default_factory=dict, kw_only=True)
    shown_regions: dict[int, weakref.ref[Region]] = field(default_factory=dict, kw_only=True)
    leaving: bool = field(default=False, kw_only=True)

    def show_region(self, region: Region) -> None:
        """The peer is told of a region of ours."""
        if region.region_id not in self.shown_regions:
            self.shown_regions[region.region_id] = weakref.ref(region)

    @property
    @abstractmethod
    def channel(self) -> LinkChannel:
        """What moves bytes between the peer's memory and ours."""
