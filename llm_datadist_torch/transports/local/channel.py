# SPDX-License-Identifier: Apache-2.0
"""The local channel to one peer, and its paths to the peer's memory, the fastest first."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

import torch

from llm_datadist_torch import _C
from llm_datadist_torch.memory.address import check_alive
from llm_datadist_torch.net.process import PeerProcess
from llm_datadist_torch.transports.base import (
    HOST_DEVICE,
    CacheVersion,
    Channel,
    Direction,
    Fit,
    LeasedCache,
    MemoryKind,
    Movement,
    PathUnavailable,
    RegionView,
    Relay,
    SameProcessPeer,
    StaleCacheError,
    timed_out,
)
from llm_datadist_torch.transports.local.copies import check_after, check_before, copy_here
from llm_datadist_torch.transports.local.host import HostIdentity, LocalOffer, why_forbidden
from llm_datadist_torch.transports.local.ipc import messages
from llm_datadist_torch.transports.local.ipc.exports import EXPORTS, Reader
from llm_datadist_torch.transports.local.ipc.path import DeviceIpc
from llm_datadist_torch.transports.local.mappings import WORD_BYTES, PeerMappings
from llm_datadist_torch.transports.local.relayed import LocalPath, Relayed, StagedBy
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import (
    LLMException,
    LLMPeerLostError,
    LLMStatusCode,
    error_for,
)

logger = logging.getLogger("llm_datadist_torch")

NAME = "local"
_DONE, _LATE, _STALE = 0, 1, 2
"""Answers of ``_C.move_mapped``; what else it says is that a tensor leaves the region."""


class LocalChannel(Channel):
    """Tries the paths in order; one that the kernel forbids is reported once and then left out.

    Thread safety: all methods may be called from any thread, also while movements are under way.
    """

    validates_reads = True
    serves_unowned = True

    def __init__(
        self, here: LocalOffer, peer: LocalOffer, relay: Relay, device: torch.device
    ) -> None:
        same_process_peer = relay.same_process_peer
        self._same_process = same_process_peer is not None
        process = relay.process
        # Nobody in another PID namespace has a pid here, but descriptors can be sent over.
        self._hidden = not self._same_process and process is not None and process.pid <= 0
        self._unreachable = "" if self._same_process else peer.unreachable_from(here, process)
        apart = "the peer is in another PID namespace" if self._hidden else ""
        self._no_ipc = self._unreachable or apart or _why_no_ipc(here, peer)
        self._stages = not self._unreachable and peer.host_only
        where: HostIdentity = here if self._same_process else peer
        if process is not None and not self._unreachable:
            where = where.seen_as(process)
        self._peer = where
        self._process = process
        self._device = device
        self._relay = relay
        self._reported: set[str] = set()
        self._left: tuple[str, ...] = ()
        self._mappings = mappings = PeerMappings(
            where,
            trusted=self._same_process,
            get_descriptor=relay.descriptor if self._hidden else None,
        )
        self._ipc = DeviceIpc(relay, mappings, device)
        relayed = Relayed(relay)
        # By where the bytes are: on both sides in host memory, at the peer in host memory, or at
        # the peer in device memory.
        self._paths: tuple[LocalPath, ...] = (relayed,)
        self._paths_to_host: tuple[LocalPath, ...] = self._paths
        self._paths_to_device: tuple[LocalPath, ...] = self._paths
        if same_process_peer is not None:
            self._paths = (SameProcess(same_process_peer, mappings),)
            self._paths_to_host = self._paths_to_device = self._paths
        elif process is not None and not self._unreachable:
            mapped = SharedMapping(mappings, where)
            reaching: list[LocalPath] = [mapped]
            if not self._hidden:
                reaching.append(ProcessMemory(mappings, process))
            self._paths = (*reaching, relayed)
            self._paths_to_host = (*map(StagedBy, reaching), relayed)
            if not self._no_ipc:
                self._paths_to_device = (self._ipc, relayed)
        self._made = self._paths

    def fit(self, kind: MemoryKind) -> Fit:
        """Well inside one process, and on one host.

        Where only the relay is left, as for device memory that AscendCL can't share, anything else
        is better.
        """
        if self._same_process:
            return Fit.good("same process")
        if kind is not MemoryKind.HOST:
            if self._stages:
                return Fit.good("same host, staged in host memory")
            if self._no_ipc:
                return Fit.last_resort(f"through the control connection, {self._no_ipc}")
            return Fit.good("same host, AscendCL's IPC")
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

    def move(self, movement: Movement, deadline: Deadline, *, at_last: bool = False) -> str:
        """See :meth:`Channel.move`; returns the name of the path that served."""
        if movement.remote_device != HOST_DEVICE.type:
            paths = self._paths_to_device
        elif movement.local_device.type != HOST_DEVICE.type:
            paths = self._paths_to_host
        else:
            paths = self._paths
        refused: PathUnavailable | None = None
        for path in paths:
            if path.name == Relayed.name and refused is not None and not at_last:
                raise refused  # another transport may be better
            try:
                path.move(movement, deadline)
            except PathUnavailable as reason:
                refused = reason
                self._leave(path, reason)
            else:
                if path.name == Relayed.name:
                    self._report_relay(path, movement)
                return path.name
        raise error_for(
            LLMStatusCode.LLM_FAILED, f"no path to the memory of process {self._peer.pid}"
        )

    def move_at_last(self, movement: Movement, deadline: Deadline) -> str:
        """See :meth:`Channel.move_at_last`: also through the control connection."""
        return self.move(movement, deadline, at_last=True)

    def _leave(self, path: LocalPath, reason: PathUnavailable) -> None:
        """Go on to the next path, for good if this one will never serve."""
        if not reason.lasting:
            logger.debug("%s can't serve: %s", path.name, reason)
            return
        self._report(path, str(reason))
        self._left = (*self._left, f"not by {path.name}: {reason}")
        self._paths = tuple(other for other in self._paths if other.name != path.name)
        self._paths_to_host = tuple(
            other for other in self._paths_to_host if other.name != path.name
        )
        path.close()

    # -- device memory that the peer wants to open ------------------------------------------------

    def serve(
        self,
        payload: bytes,
        cache: LeasedCache,
        reply: Callable[[bytes | LLMException], None],
    ) -> None:
        """See :meth:`Channel.serve`: keys to the memory of a cache."""
        wanted = messages.decode(payload, messages.Wanted)
        try:
            process = self._process
            if process is None or self._no_ipc:
                why = self._no_ipc or "the link has ended"
                raise error_for(LLMStatusCode.LLM_FEATURE_NOT_ENABLED, why)
            reader = Reader(process, wanted.process, self._tell_ended)
            addrs = cache.addrs.tolist()
            shown = messages.Shown(EXPORTS.show(addrs, cache.extent, self._device, self, reader))
            if self._process is None:  # closed meanwhile, before there was a reader to let go
                EXPORTS.end_link(self)
        except LLMException as error:
            shown = messages.Shown([], str(error))
        reply(messages.encode(shown))

    def _tell_ended(self, memory: list[messages.SharedMemory]) -> None:
        self._relay.post(NAME, messages.encode(messages.Ended(memory)))

    def note(self, payload: bytes) -> None:
        """See :meth:`Channel.note`: the peer wants to free device memory."""
        self._ipc.end(messages.decode(payload, messages.Ended))

    def read_version(self, version: CacheVersion) -> tuple[int, int] | None:
        """See :meth:`Channel.read_version`: out of a mapping, so in nanoseconds."""
        return None if self._unreachable else self._mappings.read(version)

    def _report_relay(self, path: LocalPath, movement: Movement) -> None:
        if not movement.in_host_memory:
            self._report(
                path,
                "device memory goes through the control connection, which is slow:"
                f" {self._no_ipc or 'it can not be opened'}; LLMDataDist.links() and `python -m"
                " llm_datadist_torch doctor` show what else there is",
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
        """Unmap and close everything. Movements and readers under way keep the peer's process."""
        self._process = None
        EXPORTS.end_link(self)
        self._ipc.close()
        self._mappings.close()
        # Those that serve no more, too: closing is idempotent.
        for path in self._made:
            path.close()

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the peer's memory that are mapped here, device memory included."""
        return self._mappings.nbytes + self._ipc.open_bytes


def _why_no_ipc(here: LocalOffer, peer: LocalOffer) -> str:
    """Why device memory can't be shared between two instances; "" where it can."""
    if here.no_ipc:
        return f"here: {here.no_ipc}"
    return f"at the peer: {peer.no_ipc}" if peer.no_ipc else ""


class SameProcess(LocalPath):
    """The peer is another instance in this process: its addresses are ours."""

    name = "same-process"

    def __init__(self, peer: SameProcessPeer, mappings: PeerMappings) -> None:
        self._peer = peer
        self._mappings = mappings

    def move(self, movement: Movement, deadline: Deadline) -> None:
        """Copy in memory, of whatever device."""
        check_before(movement, self._mappings)
        with self._peer.using(movement) as unowned:
            if unowned:
                device = torch.device(movement.remote_device)
                try:
                    check_alive(movement.remote_addrs, movement.remote_extent, device)
                except LLMException as error:
                    raise _unmapped() from error
            device = torch.device(movement.remote_device)
            copy_here(movement, movement.remote_addrs, device, deadline)
        check_after(movement, self._mappings)


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
