# SPDX-License-Identifier: Apache-2.0
"""One span of memory that a transport knows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

_ids = itertools.count(1)


def next_region_id() -> int:
    """A number that no other region of this process has had."""
    return next(_ids)


@dataclass(frozen=True)
class Region:
    """A span of this process's memory, as a transport must know it.

    Holding a region holds its memory. Two regions are equal when they are the same one.

    Attributes:
        address: Its start in this process.
        nbytes: Its size.
        fd: The file descriptor that peers on this host can map it through; -1 where it can't be
            shared.
        inode: Inode of that file, 0 without one: proof that an opened descriptor is the right one.
        device: Device number (``st_dev``) of that file.
        offset: Where it starts in that file, which may hold other regions too.
        reason: Why it can't be shared; empty where it can.
        keepalive: Owns the memory.
        region_id: Unique in this process.
    """

    address: int = field(compare=False)
    nbytes: int = field(compare=False)
    fd: int = field(default=-1, compare=False)
    inode: int = field(default=0, compare=False)
    device: int = field(default=0, compare=False)
    offset: int = field(default=0, compare=False)
    reason: str = field(default="", compare=False)
    keepalive: object = field(default=None, compare=False, repr=False)
    region_id: int = field(default_factory=next_region_id)

    @property
    def shareable(self) -> bool:
        """Whether peers on this host can map it."""
        return self.fd >= 0


class RegionDescriptor(int):
    """The descriptor of a region, which stays open for as long as this number is kept."""

    region: Region

    @classmethod
    def of(cls, region: Region) -> RegionDescriptor:
        """The number, with the region that it belongs to."""
        number = cls(region.fd)
        number.region = region
        return number
