# SPDX-License-Identifier: Apache-2.0
"""The four ways to move bytes on one host, fastest first; each says why it can't serve."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, TypeAlias

import torch

from llm_datadist_torch import _C, streams
from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.memory.address import check_alive
from llm_datadist_torch.memory.spans import gather, scatter
from llm_datadist_torch.transports.base import (
    Direction,
    Movement,
    Neighbour,
    RegionView,
    Relay,
    timed_out,
)
from llm_datadist_torch.transports.local.host import HostIdentity, why_forbidden
from llm_datadist_torch.transports.local.mappings import PeerMappings
from llm_datadist_torch.values.status import (
    LLMException,
    LLMPeerLostError,
    LLMStatusCode,
    error_for,
)

RELAY_CHUNK = 4 << 20
"""Bytes of one relayed message: small enough that the owner's control thread stays responsive."""

RELAY_SPANS = 1 << 16
"""Spans of one relayed message: 16 bytes each, so that many small blocks make no large request."""

_SWAPPED = torch.tensor([1, 0, 2])

Side: TypeAlias = tuple[torch.Tensor, torch.device]
"""Addresses, int64 [n], and where they are."""


class WayClosedError(Exception):
    """This way can't serve this movement.

    Nothing has been moved. ``lasting``: nor any other on this link.
    """

    def __init__(self, reason: str, *, lasting: bool) -> None:
        super().__init__(reason)
        self.lasting = lasting


class Way(ABC):
    """One way to a peer's memory."""

    name: ClassVar[str]

    @abstractmethod
    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Move all bytes.

        Raises:
            WayClosedError: Try the next way.
            LLMException: The movement failed.
        """

    def forget(self, region_id: int) -> None:  # noqa: B027  most ways set nothing up per region
        """The peer has freed this region."""

    def close(self) -> None:  # noqa: B027
        """Let go of everything."""


class SameProcess(Way):
    """The peer is another instance in this process: its addresses are ours."""

    name = "same-process"

    def __init__(self, peer: Neighbour) -> None:
        self._peer = peer

    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Copy in memory, of whatever device."""
        with self._peer.using(movement) as foreign:
            if foreign:
                device = torch.device(movement.remote_device)
                try:
                    check_alive(movement.remote_addrs, movement.measures[2], device)
                except LLMException as error:
                    raise _unmapped() from error
            _copy(movement, movement.remote_addrs, deadline)


class SharedMapping(Way):
    """The peer's caches are shareable memory.

    Map a region once, then copy without a system call.
    """

    name = "shared-mapping"

    def __init__(self, peer: HostIdentity) -> None:
        self._peer = peer
        self._mappings = PeerMappings(peer.pid)

    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Copy between local memory and the mapping."""
        region = movement.region
        if region is None or region.fd < 0:
            raise WayClosedError("the peer's cache is not in shareable memory", lasting=False)
        check_elsewhere(self._peer)
        # The local reference keeps the mapping in place while bytes move, even if the link ends
        # meanwhile.
        mapping = self._mapping(region)
        try:
            remote_addrs = _C.rebase(
                movement.remote_addrs,
                region.address,
                mapping.address,
                mapping.nbytes,
                movement.measures[2],
            )
        except IndexError as error:
            raise error_for(LLMStatusCode.LLM_FAILED, f"the peer's cache: {error}") from error
        _copy(movement, remote_addrs, deadline)

    def _mapping(self, region: RegionView) -> _C.PeerMapping:
        try:
            return self._mappings.get(region)
        except OSError as error:
            reason = why_forbidden(error.errno or 0, self._peer.pid)
            raise WayClosedError(f"mapping it failed: {error}; {reason}", lasting=False) from error

    def forget(self, region_id: int) -> None:
        """Unmap it as soon as no copy uses it."""
        self._mappings.forget(region_id)

    def close(self) -> None:
        """Unmap everything."""
        self._mappings.close()

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the peer's memory that are mapped here."""
        return self._mappings.nbytes


def check_elsewhere(peer: HostIdentity) -> None:
    """Check that a peer's pid is not ours now: that of a thread may have come up meanwhile."""
    if peer.is_here:
        raise WayClosedError(
            "the peer says that it is this process, and is not",
            lasting=True,
        )


class ProcessMemory(Way):
    """Any memory of a process that the kernel lets us read and write.

    Process_vm_readv and process_vm_writev.
    """

    name = "process-memory"

    def __init__(self, peer: HostIdentity) -> None:
        self._peer = peer

    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Let the kernel copy. A wild address on either side is an error here, never a crash."""
        check_elsewhere(self._peer)
        call = _C.read_process if movement.direction is Direction.READ else _C.write_process
        done, number = call(
            self._peer.pid,
            movement.local_addrs,
            movement.remote_addrs,
            movement.runs,
            deadline.at_ns,
        )
        if number == 0 and not self._peer.alive:
            # The pid may belong to somebody else by now, and the bytes with it.
            number = errno.ESRCH
        if number in (errno.EPERM, errno.ENOSYS, errno.EACCES) and done == 0:
            raise WayClosedError(why_forbidden(number, self._peer.pid), lasting=True)
        if number:
            raise self._error(movement, number)
        _check_done(movement, done, deadline)

    def _error(self, movement: Movement, number: int) -> LLMException:
        if number == errno.ESRCH:
            return LLMPeerLostError(
                f"process {self._peer.pid} of the peer is gone",
                status_code=LLMStatusCode.LLM_NOT_YET_LINK,
            )
        if number == errno.EFAULT:
            check_alive(movement.local_addrs, movement.measures[1])
            return _unmapped()
        return error_for(
            LLMStatusCode.LLM_FAILED, f"{why_forbidden(number, self._peer.pid)} (errno {number})"
        )


class Relayed(Way):
    """Through the control connection: slow, and works wherever a link works."""

    name = "relay"

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Ask the owner for the bytes, or send them, chunk by chunk."""
        device = movement.local_device
        if movement.local_foreign:
            check_alive(movement.local_addrs, movement.measures[1], device)
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
    local, remote, sizes = (column.tolist() for column in movement.spelled_out())
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


def _unmapped() -> LLMException:
    """The error for memory that the peer registered by addresses and then freed."""
    return error_for(
        LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        "the memory that the peer registered is no longer mapped there",
        remedy=(
            "the peer must unregister a cache before it frees its memory; register"
            " tensors instead of addresses."
        ),
    )


def _copy(movement: Movement, remote_addrs: torch.Tensor, deadline: Deadline) -> None:
    if movement.local_foreign:
        check_alive(movement.local_addrs, movement.measures[1], movement.local_device)
    here = (movement.local_addrs, movement.local_device)
    there = (remote_addrs, torch.device(movement.remote_device))
    if movement.direction is Direction.READ:
        done = _move(here, there, movement.runs, deadline)
    else:
        done = _move(there, here, movement.runs.index_select(1, _SWAPPED), deadline)
    _check_done(movement, done, deadline)


def _move(dst: Side, src: Side, runs: torch.Tensor, deadline: Deadline) -> int:
    """Copy runs between addresses of this process; returns the bytes, fewer if time was up."""
    device = streams.device_of((dst[1], src[1]))
    if device.type == streams.HOST:
        return _C.copy_runs(dst[0], src[0], runs, deadline.at_ns)
    with streams.own_stream(device):
        return _C.copy_runs_on_device(dst[0], src[0], runs, dst[1], src[1], deadline.at_ns)


def _check_done(movement: Movement, done: int, deadline: Deadline) -> None:
    if done < movement.nbytes:
        raise timed_out(deadline)
