# SPDX-License-Identifier: Apache-2.0
"""Which of an instance's transports serves which link and which memory, and why."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from llm_datadist_torch.transports.base import (
    HOST_DEVICE,
    CacheVersion,
    Channel,
    Direction,
    LeasedCache,
    MemoryKind,
    MemorySpan,
    Movement,
    PathUnavailable,
    Relay,
    StaleCacheError,
    Transport,
)
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

_Mover: TypeAlias = Callable[[Movement, Deadline], str]


@dataclass(frozen=True)
class Choice:
    """Which transport a link uses for one kind of memory.

    Attributes:
        memory: "host", or "device": at least one side is in device memory.
        transport: Its name; None where none can.
        reason: Why this one, or why none.
    """

    memory: str
    transport: str | None
    reason: str

    def __str__(self) -> str:
        """In words, for a log line."""
        return f"{self.memory} memory by {self.transport or 'nothing'} ({self.reason})"


class LinkChannel:
    """What moves the bytes of one link: for each kind of memory the best channel of both ends.

    It is chosen when the link is made, and anew when a channel says that it can't serve.

    Thread safety: all methods may be called from any thread.

    Args:
        channels: By name of their transport, preferred ones first.
    """

    def __init__(self, channels: Mapping[str, Channel]) -> None:
        self._channels = dict(channels)
        self._movers = {
            name: self._mover_of(channel, channel.move) for name, channel in channels.items()
        }
        self._last_movers = {
            name: self._mover_of(channel, channel.move_at_last)
            for name, channel in channels.items()
            if type(channel).move_at_last is not Channel.move_at_last
        }
        self._host_mover = self._bound(MemoryKind.HOST)
        self._device_mover = self._bound(MemoryKind.DEVICE)

    def move(self, movement: Movement, deadline: Deadline) -> str:
        """See :meth:`Channel.move`.

        Raises:
            LLMFeatureNotEnabledError: No transport of this link can move this movement.
        """
        host = movement.local_device.type == movement.remote_device == HOST_DEVICE.type
        mover = self._host_mover if host else self._device_mover
        if mover is not None:
            try:
                return mover(movement, deadline)
            except PathUnavailable as reason:
                logger.debug("choosing a transport anew: %s", reason)
        return self._move_otherwise(movement, deadline)

    def _move_otherwise(self, movement: Movement, deadline: Deadline) -> str:
        """Try the channels from the best to the worst, as they say now that they fit."""
        reasons: dict[str, str] = {}
        refused: dict[str, int] = {}
        while (name := self._best(movement.kind, refused)) is not None:
            level = self._channels[name].fit(movement.kind).level
            try:
                path = self._movers[name](movement, deadline)
            except PathUnavailable as reason:
                # If it says now that it fits less well, it gets another try, after better ones.
                refused[name] = level
                reasons[name] = str(reason)
            else:
                self._bind()
                return path
        for name, mover in self._last_movers.items():
            if name not in reasons:
                continue
            try:
                return mover(movement, deadline)
            except PathUnavailable as reason:
                reasons[name] = str(reason)
        for name, channel in self._channels.items():
            reasons.setdefault(name, channel.fit(movement.kind).reason)
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            f"no transport of this link moves bytes between {movement.local_device} and the"
            f" peer's {movement.remote_device}: "
            + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
            remedy="LLMDataDist.links() shows what a link can do, `python -m"
            " llm_datadist_torch doctor` what this machine can.",
        )

    def _best(self, kind: MemoryKind, refused: Mapping[str, int]) -> str | None:
        """The channel that fits best, the preferred one of equals; None if none does.

        ``refused``: Channels that have refused, and the level that they had then.
        """
        best, best_level = None, 0
        for name, channel in self._channels.items():
            level = channel.fit(kind).level
            if best_level < level < refused.get(name, level + 1):
                best, best_level = name, level
        return best

    def _mover_of(self, channel: Channel, move: _Mover) -> _Mover:
        return move if channel.validates_reads else functools.partial(self.move_validated, move)

    def _bind(self) -> None:
        self._host_mover = self._bound(MemoryKind.HOST)
        self._device_mover = self._bound(MemoryKind.DEVICE)

    def _bound(self, kind: MemoryKind) -> _Mover | None:
        name = self._best(kind, {})
        return None if name is None else self._movers[name]

    def choice(self, kind: MemoryKind) -> Choice:
        """Who would serve ``kind`` now."""
        name = self._best(kind, {})
        if name is not None:
            return Choice(kind.value, name, self._channels[name].fit(kind).reason)
        fits = {name: channel.fit(kind) for name, channel in self._channels.items()}
        reasons = "; ".join(f"{name}: {fit.reason}" for name, fit in fits.items())
        return Choice(kind.value, None, reasons)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Who would serve each kind of memory now."""
        return tuple(self.choice(kind) for kind in MemoryKind)

    @property
    def summary(self) -> str:
        """The choices in words, for a log line."""
        return "; ".join(map(str, self.choices))

    def read_version(self, version: CacheVersion) -> tuple[int, int] | None:
        """See :meth:`Channel.read_version`; of the first channel that can."""
        answers = (channel.read_version(version) for channel in self._channels.values())
        return next((counters for counters in answers if counters is not None), None)

    def move_validated(
        self, move: Callable[[Movement, Deadline], str], movement: Movement, deadline: Deadline
    ) -> str:
        """Move bytes by a channel that does not check versions itself, between two looks at them.

        Raises:
            StaleCacheError: The peer's cache is not what the movement's version says.
        """
        version = movement.version
        if movement.direction is Direction.WRITE:
            return move(movement, deadline)
        leased = movement.lease_id != 0
        before = None if version is None or leased else self.read_version(version)
        if not leased and (version is None or before is None or before[0] != version.lookup):
            raise StaleCacheError
        path = move(movement, deadline)
        current = None if version is None else self.read_version(version)
        if version is not None and current is not None and current[1] != version.memory:
            raise StaleCacheError
        return path

    def serve_by(
        self,
        transport: str,
        payload: bytes,
        cache: LeasedCache,
        reply: Callable[[bytes | LLMException], None],
    ) -> None:
        """See :meth:`Channel.serve`.

        Raises:
            LLMFeatureNotEnabledError: This side does not have the transport, or it does not serve
                memory that may be gone for all that we know.
        """
        channel = self._named(transport)
        if cache.unowned and not channel.serves_unowned:
            raise error_for(
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                "the cache was registered by addresses, which nothing keeps in place",
                remedy="register tensors.",
            )
        channel.serve(payload, cache, reply)

    def note_by(self, transport: str, payload: bytes) -> None:
        """See :meth:`Channel.note`.

        Raises:
            LLMFeatureNotEnabledError: This side does not have the transport.
        """
        self._named(transport).note(payload)

    def _named(self, transport: str) -> Channel:
        channel = self._channels.get(transport)
        if channel is None:
            raise error_for(
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                f"transport {transport!r} is not on this link",
            )
        return channel

    def forget(self, region_id: int) -> None:
        """The peer has freed this region; see :meth:`Channel.forget`."""
        for channel in self._channels.values():
            channel.forget(region_id)

    def close(self) -> None:
        """Close all channels; see :meth:`Channel.close`."""
        for channel in self._channels.values():
            channel.close()


class TransportSet:
    """The transports of one instance.

    Thread safety: all methods may be called from any thread.

    Args:
        transports: Those that it has, preferred ones first.
        unavailable: Why it does not have the others, by name.
    """

    def __init__(self, transports: Iterable[Transport], unavailable: Mapping[str, str]) -> None:
        self._transports = {transport.name: transport for transport in transports}
        # A cache has tens of spans, and each asks.
        self._registering = {kind: self._that_register(kind) for kind in MemoryKind}
        self.unavailable = dict(unavailable)

    @property
    def names(self) -> list[str]:
        """Their names, preferred ones first."""
        return list(self._transports)

    def offers(self) -> dict[str, bytes]:
        """What a peer must be told in the handshake."""
        return {name: transport.offer() for name, transport in self._transports.items()}

    def connect(self, offers: Mapping[str, bytes], relay: Relay) -> LinkChannel:
        """The channel to a peer that has made ``offers``.

        Raises:
            LLMLinkError: There is no transport that both ends have.
            msgspec.DecodeError: An offer is none.
        """
        common = [name for name in self._transports if name in offers]
        if not common:
            absent = "".join(
                f"; {name} is not used here: {self.unavailable[name]}"
                for name in offers
                if name in self.unavailable
            )
            raise error_for(
                LLMStatusCode.LLM_LINK_FAILED,
                f"no transport is on both ends: one has {self.names}, the other"
                f" {sorted(offers)}{absent}",
                remedy="set LLMConfig.transport alike on both ends, or leave it unset.",
            )
        channels: dict[str, Channel] = {}
        try:
            for name in common:
                channels[name] = self._transports[name].connect(offers[name], relay)
        except BaseException:
            LinkChannel(channels).close()
            raise
        return LinkChannel(channels)

    def register(self, spans: Iterable[MemorySpan]) -> None:
        """Register memory with every transport that wants it; all or nothing.

        Raises:
            LLMException: One of them refused, and without it nothing could move this memory.
        """
        done: list[tuple[Transport, MemorySpan]] = []
        try:
            for span in spans:
                for transport in self._registering[span.kind]:
                    try:
                        transport.register(span)
                    except LLMException as error:
                        if not self._movable_unregistered(span):
                            raise
                        logger.warning("peers can't reach it by %s: %s", transport.name, error)
                    else:
                        done.append((transport, span))
        except BaseException:
            for transport, span in reversed(done):
                transport.unregister(span)
            raise

    def retire(self, spans: Iterable[MemorySpan], keep: object) -> None:
        """Take back what :meth:`register` did for these spans. Does not block.

        Args:
            spans: See :meth:`register`.
            keep: What owns their memory, to be kept by engines that can't end a registration at
                once.
        """
        for span in spans:
            for transport in self._registering[span.kind]:
                transport.retire(span, keep)

    def unregister(self, spans: Sequence[MemorySpan], deadline: Deadline) -> None:
        """As :meth:`retire`, where somebody else may free the memory as soon as this returns.

        Args:
            spans: See :meth:`register`.
            deadline: Until when peers that have it open are waited for, at most.
        """
        for span in spans:
            for transport in self._registering[span.kind]:
                transport.unregister(span)
        for transport in self._transports.values():
            transport.wait_closed(spans, deadline)

    def close(self) -> None:
        """Close them all; idempotent."""
        for transport in self._transports.values():
            transport.close()

    def _movable_unregistered(self, span: MemorySpan) -> bool:
        """Engines want host memory pinned; that it isn't must not keep it from the host's peers."""
        return any(
            transport.capabilities.host_memory and not transport.capabilities.needs_registration
            for transport in self._transports.values()
            if span.kind is MemoryKind.HOST
        )

    def _that_register(self, kind: MemoryKind) -> tuple[Transport, ...]:
        return tuple(each for each in self._transports.values() if each.registers(kind))
