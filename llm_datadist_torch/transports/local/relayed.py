# SPDX-License-Identifier: Apache-2.0
"""What a path to a peer's memory on one host is, and the slowest one: through the connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec
import torch

from llm_datadist_torch.memory.address import check_alive
from llm_datadist_torch.memory.spans import gather, scatter
from llm_datadist_torch.transports.base import (
    HOST_DEVICE,
    Direction,
    Movement,
    Relay,
    RelayRequest,
    timed_out,
)
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMStatusCode, error_for

RELAY_CHUNK = 4 << 20
"""Bytes of one relayed message: small enough that the owner's control thread stays responsive."""

RELAY_SPANS = 1 << 16
"""Spans of one relayed message: 16 bytes each, so that many small blocks make no large request."""


class LocalPath(ABC):
    """One path to a peer's memory."""

    name: str

    @abstractmethod
    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Move all bytes.

        Raises:
            PathUnavailable: Try the next path.
            StaleCacheError: The peer's cache is not what the movement's version says.
            LLMException: The movement failed.
        """

    def forget(self, region_id: int) -> None:  # noqa: B027  most paths set nothing up per region
        """The peer has freed this region."""

    def close(self) -> None:  # noqa: B027
        """Release all resources."""


class Staged(LocalPath):
    """Through host memory of this process, piece by piece.

    Attributes:
        pieces: How many may be under way at a time.
    """

    pieces = 1

    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Move the bytes between the peer and host memory, and between that and local memory."""
        device = movement.local_device
        if movement.local_unowned:
            check_alive(movement.local_addrs, movement.local_extent, device)
        with ExitStack() as under_way:
            pieces: deque[_Piece] = deque()
            for local, spans in relay_chunks(movement):
                if deadline.expired:
                    raise timed_out(deadline)
                if len(pieces) == self.pieces:
                    pieces.popleft().finish()
                piece = self._begin(movement, local, spans, deadline)
                under_way.callback(piece.request.close)
                pieces.append(piece)
            while pieces:
                pieces.popleft().finish()

    def _begin(
        self, movement: Movement, local: torch.Tensor, spans: torch.Tensor, deadline: Deadline
    ) -> _Piece:
        sizes, device = spans[:, 1], movement.local_device
        if movement.direction is Direction.WRITE:
            data = gather(local, sizes, device)
            return _Piece(self.deliver(movement, spans, data, deadline), None)
        request = self.fetch(movement, spans, deadline)
        return _Piece(request, lambda data: _scatter(local, sizes, data, device))

    @abstractmethod
    def fetch(self, movement: Movement, spans: torch.Tensor, deadline: Deadline) -> RelayRequest:
        """Begin to get the bytes of the peer's ``spans`` (int64 [n, 2]: address, nbytes).

        Raises:
            LLMException: As :meth:`move`.
        """

    @abstractmethod
    def deliver(
        self, movement: Movement, spans: torch.Tensor, data: memoryview, deadline: Deadline
    ) -> RelayRequest:
        """Begin to write ``data`` over the peer's ``spans``; likewise."""


@dataclass
class _Piece:
    """A part of a movement that is under way.

    Attributes:
        request: What the peer has been asked for.
        receive: What is done with the bytes that come, if any do.
    """

    request: RelayRequest
    receive: Callable[[bytes | bytearray | memoryview], None] | None

    def finish(self) -> None:
        data = self.request.wait()
        if self.receive is not None:
            self.receive(data)


def _scatter(
    local: torch.Tensor,
    sizes: torch.Tensor,
    data: bytes | bytearray | memoryview,
    device: torch.device,
) -> None:
    if len(data) != int(sizes.sum()):
        raise error_for(
            LLMStatusCode.LLM_FAILED, f"the peer sent {len(data)} bytes of {int(sizes.sum())}"
        )
    scatter(local, sizes, data, device)


class Relayed(Staged):
    """Through the control connection: slow, and works wherever a link works.

    The owner checks the lease, or the claim, for each message. Two are under way at a time: the
    owner gathers the bytes of one, while those of the other are received and scattered.
    """

    name = "relay"
    pieces = 2

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def fetch(self, movement: Movement, spans: torch.Tensor, deadline: Deadline) -> RelayRequest:
        """Ask the owner for the bytes."""
        return self._relay.read(movement, spans, deadline)

    def deliver(
        self, movement: Movement, spans: torch.Tensor, data: memoryview, deadline: Deadline
    ) -> RelayRequest:
        """Send the bytes to the owner."""
        return self._relay.write(movement, spans, data, deadline)


@dataclass(frozen=True)
class _Finished:
    """A request that was carried out when it was made."""

    data: bytes | memoryview = b""

    def wait(self) -> bytes | memoryview:
        return self.data

    def close(self) -> None:
        pass


class StagedBy(Staged):
    """Between local device memory and the peer's host memory, by a path between host memories.

    Args:
        path: That path. It is closed by whoever made it.
    """

    def __init__(self, path: LocalPath) -> None:
        self._path = path
        self.name = path.name

    def fetch(self, movement: Movement, spans: torch.Tensor, deadline: Deadline) -> RelayRequest:
        """Have the path read into host memory."""
        staging = torch.empty(int(spans[:, 1].sum()), dtype=torch.uint8)
        self._path.move(_in_host_memory(movement, staging, spans), deadline)
        return _Finished(staging.numpy().data)

    def deliver(
        self, movement: Movement, spans: torch.Tensor, data: memoryview, deadline: Deadline
    ) -> RelayRequest:
        """Have the path write from host memory."""
        staging = torch.frombuffer(data, dtype=torch.uint8)
        self._path.move(_in_host_memory(movement, staging, spans), deadline)
        return _Finished()


def _in_host_memory(movement: Movement, staging: torch.Tensor, spans: torch.Tensor) -> Movement:
    """The movement between the peer's spans and ``staging``, in which they follow each other."""
    sizes = spans[:, 1]
    runs = torch.stack([sizes.cumsum(0) - sizes, spans[:, 0], sizes], dim=1).contiguous()
    return msgspec.structs.replace(
        movement,
        local_addrs=torch.tensor([staging.data_ptr()]),
        remote_addrs=torch.zeros(1, dtype=torch.int64),
        runs=runs,
        local_device=HOST_DEVICE,
        local_unowned=False,
    )


def relay_chunks(movement: Movement) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a movement into messages of at most ``RELAY_CHUNK`` bytes and ``RELAY_SPANS`` spans.

    Yields:
        Local addresses (int64 [n]) and remote spans (int64 [n, 2]: address, nbytes).
    """
    local, remote, sizes = (column.tolist() for column in movement.expanded())
    here: list[int] = []
    there: list[tuple[int, int]] = []
    room = RELAY_CHUNK
    for local_at, remote_at, nbytes in zip(local, remote, sizes, strict=True):
        for at, piece in _pieces(nbytes, room):
            here.append(local_at + at)
            there.append((remote_at + at, piece))
            room -= piece
            if room == 0 or len(here) == RELAY_SPANS:
                yield torch.tensor(here), torch.tensor(there)
                here, there, room = [], [], RELAY_CHUNK
    if here:
        yield torch.tensor(here), torch.tensor(there)


def _pieces(nbytes: int, room: int) -> Iterator[tuple[int, int]]:
    """Offsets and sizes of the pieces of one run, the first at most ``room``."""
    at = 0
    while at < nbytes:
        piece = min(room, nbytes - at)
        yield at, piece
        at, room = at + piece, RELAY_CHUNK
