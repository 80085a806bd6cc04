# SPDX-License-Identifier: Apache-2.0
"""What a transport is: it moves runs of bytes between this process's memory and a peer's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol

import msgspec
import torch

from llm_datadist_torch import _C

if TYPE_CHECKING:
    from llm_datadist_torch.deadline import Deadline

HOST_DEVICE = torch.device("cpu")


class Direction(Enum):
    """Which way the bytes go, seen from the process that moves them."""

    READ = "read"
    WRITE = "write"


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
        lease_id: The peer's name for the hold we have on its cache.
        local_foreign: The local memory was registered by bare addresses, so it may be gone.
        remote_foreign: The same of the peer's memory.
        local_device: Where the local memory is.
        remote_device: Where the peer says that its memory is: "cpu", or such as "npu:0".
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

    @property
    def in_host_memory(self) -> bool:
        """Whether the bytes of both sides are in host memory."""
        return self.local_device.type == self.remote_device == HOST_DEVICE.type

    @cached_property
    def measures(self) -> tuple[int, int, int]:
        """Of one tensor pair: bytes moved, end of the last local byte, of the last remote one."""
        return _C.measure_runs(self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes of all runs in all tensors."""
        return self.measures[0] * len(self.local_addrs)


class Relay(Protocol):
    """Bytes through the control plane, for links on which nothing faster works.

    Both calls block until the deadline at most.
    """

    def read(self, lease_id: int, spans: torch.Tensor, deadline: Deadline) -> bytes:
        """The bytes of ``spans`` (int64 [n, 2].

        Address, nbytes; in the leased cache of the peer), one after the other.
        """

    def write(self, lease_id: int, spans: torch.Tensor, data: bytes, deadline: Deadline) -> None:
        """Write ``data`` over ``spans`` of the leased cache of the peer."""


class Channel(ABC):
    """The way to one peer.

    Life cycle: 1. :meth:`Transport.connect` makes it when a link is set up. 2. :meth:`move` is
    called any number of times, from any thread, one call at a time per link. 3. :meth:`forget` when
    the peer has freed a region. 4. :meth:`close` when the link ends; idempotent, a move that is
    under way finishes or fails with a typed error.
    """

    @abstractmethod
    def move(self, movement: Movement, deadline: Deadline) -> str:
        """Move the bytes; blocks, with the GIL released.

        On return, error or not, nothing writes into local memory any more.

        Returns:
            How it went, in one word, for logs and metrics.

        Raises:
            LLMTimeoutError: The deadline passed. Some of the bytes may have been written.
            LLMException: Anything else, typed.
        """

    @abstractmethod
    def forget(self, region_id: int) -> None:
        """The peer has freed this region: let go of what was set up for it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""


class Transport(ABC):
    """One engine, for one instance.

    Life cycle: 1. constructed when the instance is initialised. 2. :meth:`offer` is sent to each
    peer in the handshake. 3. :meth:`connect` with the peer's offer gives the :class:`Channel` of
    that link. 4. :meth:`close` at finalize.
    """

    name: ClassVar[str]

    @abstractmethod
    def offer(self) -> bytes:
        """What a peer must know to connect.

        Opaque to everything but the same transport on the other side.
        """

    @abstractmethod
    def connect(self, offer: bytes, relay: Relay) -> Channel:
        """The channel to the peer that made ``offer``. Does not block."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything; idempotent."""
