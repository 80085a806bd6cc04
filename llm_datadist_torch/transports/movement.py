# SPDX-License-Identifier: Apache-2.0
"""What transports are asked to move: runs of bytes between this process's memory and a peer's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec
import torch

from llm_datadist_torch import _C
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

if TYPE_CHECKING:
    from llm_datadist_torch.deadline import Deadline

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
    """

    region_id: int
    address: int
    nbytes: int
    fd: int
    inode: int
    device: int


@dataclass(frozen=True)
class Movement:
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
        local_foreign: The local memory was registered by bare addresses, so it may be gone.
        remote_foreign: The same of the peer's memory.
        local_device: Where the local memory is.
        remote_device: Where the peer says that its memory is: "cpu", or such as "npu:0".
        cache_id: The peer's number of its cache.
        claim: By what requests to the peer are given a lease for as long as they take, where there
            is none. For the relay; transports don't look at it.
    """

    direction: Direction
    local_addrs: torch.Tensor
    remote_addrs: torch.Tensor
    runs: torch.Tensor
    region: RegionView | None
    lease_id: int
    local_foreign: bool = False
    remote_foreign: bool = False
    local_device: torch.device = HOST_DEVICE
    remote_device: str = HOST_DEVICE.type
    cache_id: int = 0
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
    def measures(self) -> tuple[int, int, int]:
        """Of one tensor pair: bytes moved, end of the last local byte, of the last remote one."""
        return _C.measure_runs(self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes of all runs in all tensors."""
        return self.measures[0] * len(self.local_addrs)

    def spelled_out(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
