# SPDX-License-Identifier: Apache-2.0
"""What transports are asked to move: runs of bytes between this process's memory and a peer's."""

from __future__ import annotations

from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec
import torch

from llm_datadist_torch import _C
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

if TYPE_CHECKING:
    from llm_datadist_torch.memory.region import Region
    from llm_datadist_torch.values.deadline import Deadline

HOST_DEVICE = torch.device("cpu")


class Direction(Enum):
    """Which way the bytes go, seen from the process that moves them."""

    READ = "read"
    WRITE = "write"


class MemoryKind(Enum):
    """What a movement needs its transport for."""

    HOST = "host"
    """Both sides are in host memory."""
    DEVICE = "device"
    """At least one side is in device memory."""


class RegionView(msgspec.Struct, frozen=True, array_like=True):
    """What a peer must know of a region to reach it.

    Attributes:
        region_id: Unique in the owner's process.
        address: Its start in the owner's process.
        nbytes: Its size.
        fd: The owner's file descriptor of the memory, or -1 where it can't be shared.
        inode: Inode of that file: proof that an opened descriptor is the right one.
        device: Device number of that file.
        offset: Where the region starts in that file.
    """

    region_id: int
    address: int
    nbytes: int
    fd: int
    inode: int
    device: int
    offset: int = 0

    @classmethod
    def of(cls, region: Region) -> RegionView:
        """What a peer is told of a region of ours."""
        return cls(
            region.region_id,
            region.address,
            region.nbytes,
            region.fd,
            region.inode,
            region.device,
            region.offset,
        )


class CacheVersion(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Two counters of a cache that its owner publishes, and their values when it answered.

    A reader that compares them around the bytes it reads (a seqlock) needs no lease.

    Attributes:
        region: The region of the owner that they lie in.
        offset: Of the first in the region, in bytes; the second follows.
        lookup: Changes with the keys of the cache and with its end.
        memory: Changes when the memory of the cache may be another cache's.
    """

    region: RegionView
    offset: int
    lookup: int
    memory: int


class StaleCacheError(Exception):
    """The peer's cache is not what the movement's version says; bytes read mean nothing."""


class PathUnavailable(Exception):  # noqa: N818  the name says what it is
    """This way can't serve this movement; nothing has been moved.

    ``lasting``: nor any other on this link.
    """

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


class Movement(msgspec.Struct, frozen=True, dict=True, eq=False):
    """Bytes to move: the same runs between each local tensor and its partner at the peer.

    Attributes:
        direction: READ moves from the peer to here.
        local_addrs: Addresses of the local tensors, int64 [n].
        remote_addrs: Addresses of the partners in the peer's process, int64 [n].
        runs: int64 [r, 3], columns (local offset, remote offset, nbytes).
        region: The peer's region that all its tensors lie in, or None for memory registered by its
            user.
        lease_id: The peer's name for the hold we have on its cache; 0 where we have none, and only
            read what any peer may.
        local_unowned: The local memory was registered by bare addresses, so it may be gone.
        remote_unowned: The same of the peer's memory.
        local_device: Where the local memory is.
        remote_device: Where the peer says that its memory is: "cpu", or such as "npu:0".
        cache_id: The peer's number of its cache.
        version: What a READ must find of the peer's cache; None where that can't be seen from here.
            With a lease only its ``memory`` after the bytes counts.
        claim: By what requests to the peer are given a lease for as long as they take, where there
            is none. For the relay; transports don't look at it.
    """

    direction: Direction
    local_addrs: torch.Tensor
    remote_addrs: torch.Tensor
    runs: torch.Tensor
    region: RegionView | None
    lease_id: int
    local_unowned: bool = False
    remote_unowned: bool = False
    local_device: torch.device = HOST_DEVICE
    remote_device: str = HOST_DEVICE.type
    cache_id: int = 0
    version: CacheVersion | None = None
    claim: object = None

    @property
    def in_host_memory(self) -> bool:
        """Whether the bytes of both sides are in host memory."""
        return self.local_device.type == self.remote_device == HOST_DEVICE.type

    @property
    def kind(self) -> MemoryKind:
        """Which kind of memory is moved."""
        return MemoryKind.HOST if self.in_host_memory else MemoryKind.DEVICE

    @cached_property
    def _extents(self) -> tuple[int, int, int]:
        return _C.measure_runs(self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes of all runs in all tensors."""
        return self._extents[0] * len(self.local_addrs)

    @property
    def local_extent(self) -> int:
        """Bytes from the start of a local tensor to the end of the last run in it."""
        return self._extents[1]

    @property
    def remote_extent(self) -> int:
        """Bytes from the start of a tensor of the peer's to the end of the last run in it."""
        return self._extents[2]

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Every run of every tensor: local addresses, remote addresses and bytes, int64 [n]."""
        local = (self.local_addrs[:, None] + self.runs[None, :, 0]).flatten()
        remote = (self.remote_addrs[:, None] + self.runs[None, :, 1]).flatten()
        return local, remote, self.runs[:, 2].repeat(len(self.local_addrs))


def timed_out(deadline: Deadline) -> LLMException:
    """The error of a movement whose time is up."""
    return error_for(
        LLMStatusCode.LLM_TIMEOUT,
        f"the transfer did not finish within {deadline.budget_ms} ms; the destination is partly"
        " written",
        remedy="raise sync_kv_timeout; the link stays usable.",
    )
