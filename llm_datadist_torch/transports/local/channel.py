# SPDX-License-Identifier: Apache-2.0
"""The local channel to one peer, and its paths to the peer's memory, the fastest first."""

from __future__ import annotations

import errno
import logging
from typing import TypeAlias

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory import device_copies, streams
from llm_datadist_torch.memory.address import check_alive
from llm_datadist_torch.net.process import PeerProcess
from llm_datadist_torch.transports.base import (
    HOST_DEVICE,
    CacheVersion,
    Channel,
    Direction,
    Fit,
    MemoryKind,
    Movement,
    PathUnavailable,
    RegionView,
    Relay,
    SameProcessPeer,
    StaleCacheError,
    timed_out,
)
from llm_datadist_torch.transports.local.host import HostIdentity, why_forbidden
from llm_datadist_torch.transports.local.mappings import WORD_BYTES, PeerMappings
from llm_datadist_torch.transports.local.relayed import LocalPath, Relayed
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import (
    LLMException,
    LLMPeerLostError,
    LLMStatusCode,
    error_for,
)

logger = logging.getLogger("llm_datadist_torch")

_DONE, _LATE, _STALE = 0, 1, 2
"""Answers of ``_C.move_mapped``; what else it says is that a tensor leaves the region."""
_SWAPPED = torch.tensor([1, 0, 2])

Side: TypeAlias = tuple[torch.Tensor, torch.device]
"""Addresses, int64 [n], and where they are."""


class LocalChannel(Channel):
    """Tries the paths in order; one that the kernel forbids is reported once and then left out.

    Thread safety: all methods may be called from any thread, also while movements are under way.
    """

    validates_reads = True

    def __init__(self, here: HostIdentity, peer: HostIdentity, relay: Relay) -> None:
        same_process_peer = relay.same_process_peer
        self._same_process = same_process_peer is not None
        process = relay.process
        # Nobody in another PID namespace has a pid here, but descriptors can be sent over.
        self._hidden = not self._same_process and process is not None and process.pid <= 0
        self._unreachable = "" if self._same_process else peer.unreachable_from(here, process)
        if process is not None and not self._unreachable:
            peer = peer.seen_as(process)
        self._peer = peer = here if self._same_process else peer
        self._reported: set[str] = set()
        self._left: tuple[str, ...] = ()
        self._mappings = PeerMappings(
            peer,
            trusted=self._same_process,
            get_descriptor=relay.descriptor if self._hidden else None,
        )
        relayed = Relayed(relay)
        # The other paths between processes reach what the host's processors can read.
        self._device_paths: tuple[LocalPath, ...] = (relayed,)
        self._paths: tuple[LocalPath, ...]
        if same_process_peer is not None:
            self._paths = self._device_paths = (SameProcess(same_process_peer, self._mappings),)
        elif self._unreachable or process is None:
            self._paths = (relayed,)
        elif self._hidden:
            self._paths = (SharedMapping(self._mappings, peer), relayed)
        else:
            mappings = self._mappings
            self._paths = (
                SharedMapping(mappings, peer),
                ProcessMemory(mappings, process),
                relayed,
            )

    def fit(self, kind: MemoryKind) -> Fit:
        """Well inside one process, and host memory between processes.

        Where only the relay is left, as for device memory between processes, anything else is
        better.
        """
        if kind is not MemoryKind.HOST and not self._same_process:
            return Fit.last_resort("through the control connection, device memory")
        if isinstance(self._paths[0], Relayed):
            why = "; ".join(self._left) or "the kernel forbids the other paths"
            reason = self._unreachable or why
            return Fit.last_resort(f"through the control connection, {reason}")
        if self._hidden:
            return Fit.good(
                "same host, in another PID namespace: regions by descriptors that the peer sends;"
                " memory that it has registered goes through the control connection (containers:"
                " share the namespace with --pid)"
            )
        where = "same process" if self._same_process else "same host"
        return Fit.good("; ".join((where, *self._left)))

    def move(self, movement: Movement, deadline: Deadline) -> str:
        """See :meth:`Channel.move`; returns the name of the path that served."""
        host = movement.local_device.type == movement.remote_device == HOST_DEVICE.type
        for path in self._paths if host else self._device_paths:
            try:
                path.move(movement, deadline)
            except PathUnavailable as reason:
                self._leave(path, reason)
            else:
                if path.name == Relayed.name:
                    self._report_relay(path, movement)
                return path.name
        raise error_for(
            LLMStatusCode.LLM_FAILED, f"no path to the memory of process {self._peer.pid}"
        )

    def _leave(self, path: LocalPath, reason: PathUnavailable) -> None:
        """Go on to the next path.

        Raises:
            PathUnavailable: Only the relay is left now: another transport may be better.
        """
        if not reason.lasting:
            logger.debug("%s can't serve: %s", path.name, reason)
            return
        self._report(path, str(reason))
        self._left = (*self._left, f"not by {path.name}: {reason}")
        self._paths = tuple(other for other in self._paths if other is not path)
        path.close()
        if isinstance(self._paths[0], Relayed):
            raise reason

    def read_version(self, version: CacheVersion) -> tuple[int, int] | None:
        """See :meth:`Channel.read_version`: out of a mapping, so in nanoseconds."""
        return None if self._unreachable else self._mappings.read(version)

    def _report_relay(self, path: LocalPath, movement: Movement) -> None:
        if not movement.in_host_memory:
            self._report(
                path,
                "device memory goes through the control connection, which is slow; HIXL moves it"
                " faster, see LLMDataDist.links()",
            )
        if self._unreachable:
            self._report(
                path, f"{self._unreachable}: bytes go through the control connection, which is slow"
            )

    def _report(self, path: LocalPath, reason: str) -> None:
        if reason not in self._reported:
            self._reported.add(reason)
            logger.warning(
                "local transport, peer process %d, %s: %s", self._peer.pid, path.name, reason
            )

    def forget(self, region_id: int) -> None:
        """Unmap a region."""
        self._mappings.forget(region_id)

    def close(self) -> None:
        """Unmap everything."""
        self._mappings.close()
        for path in self._paths:
            path.close()

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the peer's memory that are mapped here."""
        return self._mappings.nbytes


class SameProcess(LocalPath):
    """The peer is another instance in this process: its addresses are ours."""

    name = "same-process"

    def __init__(self, peer: SameProcessPeer, mappings: PeerMappings) -> None:
        self._peer = peer
        self._mappings = mappings

    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Copy in memory, of whatever device."""
        _check_before(movement, self._mappings)
        with self._peer.using(movement) as unowned:
            if unowned:
                device = torch.device(movement.remote_device)
                try:
                    check_alive(movement.remote_addrs, movement.remote_extent, device)
                except LLMException as error:
                    raise _unmapped() from error
            _copy(movement, movement.remote_addrs, deadline)
        _check_after(movement, self._mappings)


class SharedMapping(LocalPath):
    """The peer's caches are shareable memory.

    A region is mapped once; then bytes are copied without a system call.
    """

    name = "shared-mapping"

    def __init__(self, mappings: PeerMappings, peer: HostIdentity) -> None:
        self._mappings = mappings
        self._peer = peer

    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Copy between local memory and the mapping."""
        region = movement.region
        if region is None or region.fd < 0:
            raise PathUnavailable("the peer's cache is not in shareable memory")
        # The local references keep the mappings in place while bytes move, even if the link ends
        # meanwhile.
        mapping = self._mappings.by_region.get(region.region_id) or self._map(region)
        if movement.local_unowned:
            check_alive(movement.local_addrs, movement.local_extent, movement.local_device)
        write = movement.direction is Direction.WRITE
        _mapped, version = (None, ()) if write else _version_of(movement, self._mappings)
        state = _C.move_mapped(
            write,
            movement.local_addrs,
            movement.remote_addrs,
            movement.runs,
            region.address,
            mapping.address,
            mapping.nbytes,
            deadline.at_ns,
            *version,
        )
        if state != _DONE:
            raise _failure(state, movement, deadline)

    def _map(self, region: RegionView) -> _C.PeerMapping:
        try:
            return self._mappings.get(region)
        except OSError as error:
            hidden = self._peer.pid <= 0
            reason = "" if hidden else "; " + why_forbidden(error.errno or 0, self._peer.pid)
            raise PathUnavailable(f"mapping it failed: {error}{reason}") from error


class ProcessMemory(LocalPath):
    """Any memory of a process that the kernel lets us read and write.

    By process_vm_readv and process_vm_writev. They take a pid, which another process may have by
    now: that the peer's process lives is checked before each of them, and after the last.
    """

    name = "process-memory"

    def __init__(self, mappings: PeerMappings, process: PeerProcess) -> None:
        self._mappings = mappings
        self._process: PeerProcess | None = process

    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Let the kernel copy. A wild address on either side is an error here, never a crash."""
        # The local reference keeps the pidfd open, even if the link ends meanwhile.
        process = self._process
        if process is None:
            raise PathUnavailable("the link has ended")
        tables = (movement.local_addrs, movement.remote_addrs, movement.runs)
        identity = (deadline.at_ns, process.fileno(), process.start_time)
        if movement.direction is Direction.READ:
            _mapped, version = _version_of(movement, self._mappings)
            done, number = _C.read_process(process.pid, *tables, *identity, *version)
        else:
            done, number = _C.write_process(process.pid, *tables, *identity)
        if number == errno.ESTALE:
            raise StaleCacheError
        if number in (errno.EPERM, errno.ENOSYS, errno.EACCES) and done == 0:
            raise PathUnavailable(why_forbidden(number, process.pid), lasting=True)
        if number:
            raise self._error(movement, number, process.pid)
        if done < movement.nbytes:
            raise timed_out(deadline)

    @staticmethod
    def _error(movement: Movement, number: int, pid: int) -> LLMException:
        if number == errno.ESRCH:
            return LLMPeerLostError(
                f"process {pid} of the peer is gone",
                status_code=LLMStatusCode.LLM_NOT_YET_LINK,
            )
        if number == errno.EFAULT:
            check_alive(movement.local_addrs, movement.local_extent)
            return _unmapped()
        return error_for(LLMStatusCode.LLM_FAILED, f"{why_forbidden(number, pid)} (errno {number})")

    def close(self) -> None:
        """Drop the peer's process; a movement under way keeps it."""
        self._process = None


def _version_of(
    movement: Movement, mappings: PeerMappings
) -> tuple[_C.PeerMapping | None, tuple[int, ...]]:
    """What the extension checks before and after the bytes of a READ.

    Returns:
        What keeps the counters mapped; and their address, whether there is a lease, and the values
        they must have. Nothing where they can't be seen and the lease is enough.

    Raises:
        StaleCacheError: They would have to be checked, because there is no lease, and can't be.
    """
    version, leased = movement.version, movement.lease_id != 0
    if version is not None:
        region = version.region
        mapping = mappings.by_region.get(region.region_id) or mappings.find(region)
        if mapping is not None and 0 <= version.offset <= mapping.nbytes - 2 * WORD_BYTES:
            address = mapping.address + version.offset
            return mapping, (address, leased, version.lookup, version.memory)
    if not leased:
        raise StaleCacheError
    return None, ()


def _failure(state: int, movement: Movement, deadline: Deadline) -> Exception:
    """What :class:`SharedMapping` raises where not all went well."""
    if state == _STALE:
        return StaleCacheError()
    if state == _LATE:
        return timed_out(deadline)
    return error_for(
        LLMStatusCode.LLM_FAILED,
        f"the peer's cache {movement.cache_id} leaves the region that the peer says it lies in",
    )


def _check_before(movement: Movement, mappings: PeerMappings) -> None:
    """Before a READ without a lease: the key must still lead to this cache.

    Raises:
        StaleCacheError: It does not, or that can't be seen.
    """
    if movement.direction is Direction.READ and movement.lease_id == 0:
        version = movement.version
        counters = None if version is None else mappings.read(version)
        if version is None or counters is None or counters[0] != version.lookup:
            raise StaleCacheError


def _check_after(movement: Movement, mappings: PeerMappings) -> None:
    """After a READ: the memory must have been the cache's until now, as far as that can be seen.

    Raises:
        StaleCacheError: It was not.
    """
    version = movement.version
    if movement.direction is Direction.READ and version is not None:
        counters = mappings.read(version)
        if counters is not None and counters[1] != version.memory:
            raise StaleCacheError


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
    if movement.local_unowned:
        check_alive(movement.local_addrs, movement.local_extent, movement.local_device)
    here = (movement.local_addrs, movement.local_device)
    there = (remote_addrs, torch.device(movement.remote_device))
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
