# SPDX-License-Identifier: Apache-2.0
"""What the two ends of a channel say to each other, through the control connection."""

from __future__ import annotations

import msgspec
import torch


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Write spans of the leased cache to me. Answered, when all bytes have landed, by nothing.

    Attributes:
        number: Of this request, for :class:`Stop`.
        ticket: Of the asker's agent and memory.
        runs: Native int64 [3, n]: addresses at the owner, addresses at the asker, bytes.
    """

    number: int
    ticket: bytes
    runs: bytes


class Expect(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """I am going to write to the leased cache. Answered by the ticket of its memory."""

    number: int


class Stop(msgspec.Struct, frozen=True, array_like=True):
    """The asker has given up the request of this number. No answer.

    Attributes:
        number: Of the request.
        failed: Something may still be on its way.
    """

    number: int
    failed: bool


Asked = Fetch | Expect


def runs_in(raw: bytes) -> torch.Tensor:
    """``Fetch.runs`` as a tensor.

    Raises:
        msgspec.ValidationError: They are none.
    """
    if not raw or len(raw) % 24:
        raise msgspec.ValidationError(f"{len(raw)} bytes are no runs")
    return torch.frombuffer(bytearray(raw), dtype=torch.int64).view(3, -1)
