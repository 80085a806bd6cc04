# SPDX-License-Identifier: Apache-2.0
"""What a path to a peer's memory on one host is, and the slowest one: through the connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch

from llm_datadist_torch.memory.address import check_alive
from llm_datadist_torch.memory.spans import gather, scatter
from llm_datadist_torch.transports.base import Direction, Movement, Relay, timed_out
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMStatusCode, error_for

RELAY_CHUNK = 4 << 20
"""Bytes of one relayed message: small enough that the owner's control thread stays responsive."""

RELAY_SPANS = 1 << 16
"""Spans of one relayed message: 16 bytes each, so that many small blocks make no large request."""


class LocalPath(ABC):
    """One path to a peer's memory."""

    name: ClassVar[str]

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


class Relayed(LocalPath):
    """Through the control connection: slow, and works wherever a link works.

    The owner checks the lease, or the claim, for each message.
    """

    name = "relay"

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Ask the owner for the bytes, or send them, chunk by chunk."""
        device = movement.local_device
        if movement.local_unowned:
            check_alive(movement.local_addrs, movement.local_extent, device)
        for local, spans in relay_chunks(movement):
            if deadline.expired:
                raise timed_out(deadline)
            sizes = spans[:, 1]
            if movement.direction is Direction.WRITE:
                self._relay.write(movement, spans, gather(local, sizes, device), deadline)
                continue
            data = self._relay.read(movement, spans, deadline)
            if len(data) != int(sizes.sum()):
                raise error_for(
                    LLMStatusCode.LLM_FAILED,
                    f"the peer sent {len(data)} bytes of {int(sizes.sum())}",
                )
            scatter(local, sizes, data, device)


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
