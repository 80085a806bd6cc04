# SPDX-License-Identifier: Apache-2.0
"""Copies between local memory and a peer's that this process can reach, and what guards READs."""

from __future__ import annotations

from typing import TypeAlias

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory import device_copies, streams
from llm_datadist_torch.memory.address import check_alive
from llm_datadist_torch.transports.base import Direction, Movement, StaleCacheError, timed_out
from llm_datadist_torch.transports.local.mappings import PeerMappings
from llm_datadist_torch.values.deadline import Deadline

_SWAPPED = torch.tensor([1, 0, 2])

Side: TypeAlias = tuple[torch.Tensor, torch.device]
"""Addresses, int64 [n], and where they are."""


def check_before(movement: Movement, mappings: PeerMappings) -> None:
    """Before a READ without a lease: the key must still lead to this cache.

    Raises:
        StaleCacheError: It does not, or that can't be seen.
    """
    if movement.direction is Direction.READ and movement.lease_id == 0:
        version = movement.version
        counters = None if version is None else mappings.read(version)
        if version is None or counters is None or counters[0] != version.lookup:
            raise StaleCacheError


def check_after(movement: Movement, mappings: PeerMappings) -> None:
    """After a READ: the memory must have been the cache's until now, as far as that can be seen.

    Raises:
        StaleCacheError: It was not.
    """
    version = movement.version
    if movement.direction is Direction.READ and version is not None:
        counters = mappings.read(version)
        if counters is not None and counters[1] != version.memory:
            raise StaleCacheError


def copy_here(
    movement: Movement,
    remote_addrs: torch.Tensor,
    remote_device: torch.device,
    deadline: Deadline,
) -> None:
    """Copy between local memory and memory of the peer's that has addresses here, too.

    Args:
        movement: What to copy.
        remote_addrs: Those addresses, int64 [n].
        remote_device: The device that reaches them.
        deadline: By when.

    Raises:
        LLMTimeoutError: The deadline passed.
        LLMDeviceError: The device reported an error.
    """
    if movement.local_unowned:
        check_alive(movement.local_addrs, movement.local_extent, movement.local_device)
    here = (movement.local_addrs, movement.local_device)
    there = (remote_addrs, remote_device)
    if movement.direction is Direction.READ:
        done = _move(here, there, movement.runs, deadline)
    else:
        done = _move(there, here, movement.runs.index_select(1, _SWAPPED), deadline)
    if done < movement.nbytes:
        raise timed_out(deadline)


def _move(dst: Side, src: Side, runs: torch.Tensor, deadline: Deadline) -> int:
    """Copy runs between addresses of this process; returns the bytes, fewer if time was up."""
    device = streams.device_of((dst[1], src[1]))
    if device.type == streams.HOST:
        return _C.copy_runs(dst[0], src[0], runs, deadline.at_ns)
    with streams.own_stream(device):
        return device_copies.copy_runs(dst[0], src[0], runs, dst[1], src[1], deadline.at_ns)
