# SPDX-License-Identifier: Apache-2.0
"""What a transport is: it moves runs of bytes between this process's memory and a peer's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch

from llm_datadist_torch.transports.movement import (
    HOST_DEVICE,
    CacheVersion,
    Direction,
    MemoryKind,
    Movement,
    PathUnavailable,
    RegionView,
    StaleCacheError,
    timed_out,
)
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

if TYPE_CHECKING:
    from llm_datadist_torch.net.process import PeerProcess
    from llm_datadist_torch.values.config import EngineConfig
    from llm_datadist_torch.values.deadline import Deadline

__all__ = [
    "HOST_DEVICE",
    "CacheVersion",
    "Capabilities",
    "Channel",
    "Direction",
    "Fit",
    "LeasedCache",
    "MemoryKind",
    "MemorySpan",
    "Movement",
    "PathUnavailable",
    "RegionView",
    "Relay",
    "SameProcessPeer",
    "StaleCacheError",
    "Transport",
    "joined_spans",
    "spans_in_storages",
    "timed_out",
]


class SameProcessPeer(Protocol):
    """A peer that is proven to be in this process."""

    def using(self, movement: Movement) -> AbstractContextManager[bool]:
        """Keep the peer's cache in place meanwhile. Does not block.

        Returns:
            A context manager that yields whether the memory may be gone all the same, because the
            peer's user registered it by bare addresses.

        Raises:
            LLMException: The peer has not leased the cache, or the movement leaves it.
        """


class RelayRequest(Protocol):
    """A read or a write that the peer has been asked for."""

    def wait(self) -> bytes | bytearray | memoryview:
        """Block until the peer has answered, at most until the deadline; the bytes it has read.

        Raises:
            LLMException: It refuses, is lost, or does not answer in time.
        """

    def close(self) -> None:
        """Want no answer any more. Idempotent."""


class Relay(Protocol):
    """What the control plane does for channels.

    Above all it moves bytes, for links on which nothing faster works. Calls block until the
    deadline at most.

    Attributes:
        same_process_peer: The peer, where it is in this process. What its offer says does not prove
            that.
        process: The peer's process, as the kernel knows it by the connection; None where nothing
            proves that it is on this host.
    """

    @property
    def process(self) -> PeerProcess | None:
        """See above."""

    @property
    def same_process_peer(self) -> SameProcessPeer | None:
        """See above."""

    def descriptor(self, region: RegionView) -> int:
        """Have the peer send a descriptor of one of its regions; blocks for a moment at most.

        Returns:
            The descriptor, owned by the caller.

        Raises:
            OSError: It sends none.
        """

    def read(self, movement: Movement, spans: torch.Tensor, deadline: Deadline) -> RelayRequest:
        """Ask for the bytes of ``spans`` (int64 [n, 2]: address, nbytes) of the peer's cache.

        Does not block. They come one after the other.
        """

    def write(
        self, movement: Movement, spans: torch.Tensor, data: memoryview, deadline: Deadline
    ) -> RelayRequest:
        """Ask the peer to write ``data`` over ``spans`` of its cache. Does not block.

        ``data`` must not be changed before it has.
        """

    def call(self, movement: Movement, transport: str, payload: bytes, deadline: Deadline) -> bytes:
        """Ask the channel of this transport on the other side; see :meth:`Channel.serve`."""

    def post(self, transport: str, payload: bytes) -> None:
        """Tell it something; see :meth:`Channel.note`. Does not block."""


class LeasedCache(Protocol):
    """A cache of ours that the peer holds a lease on, for :meth:`Channel.serve`.

    Attributes:
        addrs: Addresses of its tensors, int64 [n].
        extent: Bytes of each.
        writable: Whether the lease is for writing.
        unowned: It was registered by bare addresses: nothing keeps its memory in place. Only
            channels that say :attr:`Channel.serves_unowned` see such a cache.
    """

    addrs: torch.Tensor
    extent: int
    writable: bool
    unowned: bool

    def check(self, addrs: torch.Tensor, nbytes: torch.Tensor) -> None:
        """Raise LLMParamError unless all stretches (int64 [n]) lie inside its rows."""

    def acquire(self) -> None:
        """Keep its memory in place, also when the lease ends, until :meth:`end`."""

    def end(self) -> None:
        """Give back one :meth:`acquire`."""


class Fit(NamedTuple):
    """How well a channel serves one kind of memory.

    Attributes:
        level: 0 not at all, 1 when nothing better can, 2 well.
        reason: Why, in a few words for logs and ``LinkInfo``: "same host".
    """

    level: int
    reason: str

    @classmethod
    def none(cls, reason: str) -> Fit:
        """It can't serve."""
        return cls(0, reason)

    @classmethod
    def last_resort(cls, reason: str) -> Fit:
        """It works, and anything else is better."""
        return cls(1, reason)

    @classmethod
    def good(cls, reason: str) -> Fit:
        """It is made for this."""
        return cls(2, reason)


class Channel(ABC):
    """The way to one peer.

    Life cycle: 1. :meth:`Transport.connect` makes it when a link is set up. 2. :meth:`move` is
    called any number of times, from any thread, also while other calls of it are under way.
    3. :meth:`forget` when the peer has freed a region. 4. :meth:`close` when the link ends;
    idempotent, a move that is under way finishes or fails with a typed error.
    """

    validates_reads: ClassVar[bool] = False
    """Whether :meth:`move` itself sees to it that a READ gets bytes of the cache it names.

    By reading ``movement.version`` before and after the bytes, or because the peer takes part in
    each movement and checks the lease or the claim. Of other channels the link does the former.
    """

    serves_unowned: ClassVar[bool] = False
    """Whether :meth:`serve` takes caches that were registered by bare addresses."""

    @abstractmethod
    def fit(self, kind: MemoryKind) -> Fit:
        """How well it can serve ``kind`` with this peer, as far as is known now. Does not block.

        Asked when the link is made, and again when :meth:`move` raises :class:`PathUnavailable`.
        """

    @abstractmethod
    def move(self, movement: Movement, deadline: Deadline) -> str:
        """Move the bytes; blocks, with the GIL released.

        On return, error or not, nothing writes into local memory any more.

        Returns:
            How it went, in one word, for logs and metrics.

        Raises:
            PathUnavailable: It can't serve this movement, or not as well as :meth:`fit` said;
                nothing has been moved. The link asks for fits again, and tries the best one.
            StaleCacheError: The peer's cache is not what the movement's version says.
            LLMTimeoutError: The deadline passed. Some of the bytes may have been written.
            LLMException: Anything else, typed.
        """

    def move_at_last(self, movement: Movement, deadline: Deadline) -> str:
        """As :meth:`move`, where no other channel serves: waits for what passes by itself.

        Called after :meth:`move` has raised :class:`PathUnavailable`.
        """
        return self.move(movement, deadline)

    def read_version(self, version: CacheVersion) -> tuple[int, int] | None:  # noqa: ARG002
        """The counters of a version as they are now (lookup, memory), without asking the peer.

        They are read after the bytes of every movement that has returned, and before those of one
        that begins later.

        Returns:
            Their values; None where that is impossible or would take more than a message.
        """
        return None

    def serve(
        self,
        payload: bytes,
        cache: LeasedCache,
        reply: Callable[[bytes | LLMException], None],
    ) -> None:
        """The peer's channel of this transport asks something (``Relay.call``). Must not block.

        Args:
            payload: What it said.
            cache: What its lease is on.
            reply: To be called once, from any thread, with the answer.

        Raises:
            LLMException: The answer, too.
            msgspec.DecodeError: ``payload`` is nothing that this transport says.
        """
        del payload, cache, reply
        raise error_for(LLMStatusCode.LLM_FEATURE_NOT_ENABLED, "this transport answers nothing")

    def note(self, payload: bytes) -> None:
        """The peer's channel of this transport tells something (``Relay.post``). Must not block.

        Raises:
            LLMException: For the log.
            msgspec.DecodeError: ``payload`` is nothing that this transport says.
        """
        del payload
        raise error_for(LLMStatusCode.LLM_FEATURE_NOT_ENABLED, "this transport is told nothing")

    @abstractmethod
    def forget(self, region_id: int) -> None:
        """Drop what was set up for this region, which the peer has freed. Must not block."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources. Must not block: it is called from the thread that serves links."""


@dataclass(frozen=True)
class Capabilities:
    """What a transport can do, whatever the peer; :meth:`Channel.fit` says what it can with one.

    Attributes:
        host_memory: It moves host memory.
        device_memory: It moves device memory.
        same_process: It serves peers in this process.
        same_host: It serves other processes of this host.
        between_hosts: It serves other hosts.
        cancel: It can stop a movement; else it must break its connection to stop one.
        needs_registration: It moves only memory that both owners have registered with it.
    """

    host_memory: bool
    device_memory: bool
    same_process: bool
    same_host: bool
    between_hosts: bool
    cancel: bool
    needs_registration: bool


class MemorySpan(NamedTuple):
    """A stretch of this process's memory that peers may reach.

    Attributes:
        address: Its start.
        nbytes: Its size.
        device: Where it is.
        storage: Address and bytes of the tensor's storage that it lies in, where there is one: an
            engine that registers whole storages registers each once.
    """

    address: int
    nbytes: int
    device: torch.device
    storage: tuple[int, int] | None = None

    @property
    def kind(self) -> MemoryKind:
        """Which kind of memory it is."""
        return MemoryKind.HOST if self.device.type == HOST_DEVICE.type else MemoryKind.DEVICE


def joined_spans(addrs: Iterable[int], nbytes: int, device: torch.device) -> list[MemorySpan]:
    """The memory of tensors of ``nbytes``; those that lie between each other are one span."""
    spans: list[MemorySpan] = []
    for address in sorted(addrs):
        if spans and address < spans[-1].address + spans[-1].nbytes:
            first = spans.pop().address
            spans.append(MemorySpan(first, address + nbytes - first, device))
        else:
            spans.append(MemorySpan(address, nbytes, device))
    return spans


def spans_in_storages(
    spans: Iterable[MemorySpan], storages: Iterable[tuple[int, int]]
) -> list[MemorySpan]:
    """The spans, each with the storage (address, nbytes) that it lies in, if there is one."""
    order = sorted(set(storages))
    starts = [start for start, _ in order]

    def placed(span: MemorySpan) -> MemorySpan:
        address, nbytes, device, _ = span
        at = bisect_right(starts, address) - 1
        if at < 0 or address + nbytes > sum(order[at]):
            return span
        return MemorySpan(address, nbytes, device, order[at])

    return [placed(span) for span in spans]


class Transport(ABC):
    """One engine, for one instance.

    Life cycle: 1. :meth:`availability` is asked before anything is made. 2. Constructed when the
    instance is initialised. 3. :meth:`register` and :meth:`unregister` as memory comes and goes,
    before and after linking. 4. :meth:`offer` is sent to each peer in the handshake.
    5. :meth:`connect` with the peer's offer gives the :class:`Channel` of that link.
    6. :meth:`close` at finalize, after all channels.

    Thread safety: all methods may be called from any thread.

    Args:
        config: The configuration of the instance.
        device: What ``Placement.DEVICE`` is in it.

    Raises:
        LLMException: The engine does not start. Unless the transport was asked for by name, the
            instance then does without it.
    """

    name: ClassVar[str]
    """Its name in ``LLMConfig.transport``, logs and handshakes; the same on both ends."""
    capabilities: ClassVar[Capabilities]
    preference: ClassVar[int]
    """Among transports that serve equally well the highest is taken."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self._config = config
        self._device = device

    @classmethod
    @abstractmethod
    def availability(cls, config: EngineConfig, device: torch.device) -> str | None:
        """Why an instance with this configuration can't have it, and the fix; None if it can.

        Must not start anything.
        """

    @abstractmethod
    def offer(self) -> bytes:
        """What a peer must know to connect.

        Opaque to everything but the same transport on the other side.
        """

    @abstractmethod
    def connect(self, offer: bytes, relay: Relay) -> Channel:
        """The channel to the peer that made ``offer``. Does not block.

        Raises:
            LLMException: ``offer`` is from a version that this one can't talk to.
            msgspec.DecodeError: ``offer`` is none.
        """

    def registers(self, kind: MemoryKind) -> bool:
        """Whether memory of this kind is registered with it, by :meth:`register`.

        All kinds of memory that the capabilities name, if they say ``needs_registration``.
        """
        host = kind is MemoryKind.HOST
        named = self.capabilities.host_memory if host else self.capabilities.device_memory
        return self.capabilities.needs_registration and named

    def register(self, span: MemorySpan) -> None:  # noqa: B027  most transports need none
        """Make a span reachable for peers and usable for movements.

        Called only for memory that it :meth:`registers`. The same span may be registered several
        times; it ends with the last ``unregister``.

        Raises:
            LLMException: It could not be; nothing has changed.
        """

    def unregister(self, span: MemorySpan) -> None:  # noqa: B027
        """End one :meth:`register` of ``span``, if there was one, so that it may be freed.

        Never fails. It may be freed after :meth:`wait_closed`.
        """

    def wait_closed(self, spans: Sequence[MemorySpan], deadline: Deadline) -> None:  # noqa: B027
        """Block until no peer reaches the memory of unregistered spans, or until the deadline.

        For engines that must have peers close it first: all spans of a cache are unregistered
        before this is called once. Never fails; memory that is still open at the deadline is
        logged.
        """

    def retire(self, span: MemorySpan, keep: object) -> None:
        """End one :meth:`register` of ``span``, whose memory nobody but ``keep`` owns any more.

        For engines that can't end it at any time: they keep ``keep`` until it has ended. Never
        fails; does not block.
        """
        del keep
        self.unregister(span)

    @abstractmethod
    def close(self) -> None:
        """Release all resources; idempotent."""
