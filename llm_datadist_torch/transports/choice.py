# SPDX-License-Identifier: Apache-2.0
"""Which of an instance's transports serves which link and which memory, and why."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.transports.base import (
    Channel,
    Fit,
    LeasedCache,
    MemoryKind,
    MemorySpan,
    Movement,
    RegionView,
    Relay,
    Transport,
)
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")


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


class LinkChannel(Channel):
    """The way of one link: for each movement, the best of the channels that both ends have.

    Asked anew for each movement, because a channel learns with use what the machine forbids.

    Args:
        channels: By name of their transport, preferred ones first.
    """

    def __init__(self, channels: Mapping[str, Channel]) -> None:
        self._channels = dict(channels)

    def _best(self, kind: MemoryKind, movement: Movement | None = None) -> tuple[str, Fit]:
        channels = self._channels
        if movement is not None:
            takers = {name: each for name, each in channels.items() if each.takes(movement)}
            # Where none takes it, the best one says why.
            channels = takers or channels
        fits = {name: channel.fit(kind) for name, channel in channels.items()}
        # max() takes the first of equals, the preferred one.
        name = max(fits, key=lambda name: fits[name].level)
        if fits[name].level:
            return name, fits[name]
        return name, Fit.none("; ".join(f"{name}: {fit.reason}" for name, fit in fits.items()))

    def choice(self, kind: MemoryKind) -> Choice:
        """Who would serve ``kind`` now."""
        name, fit = self._best(kind)
        return Choice(kind.value, name if fit.level else None, fit.reason)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Who would serve each kind of memory now."""
        return tuple(self.choice(kind) for kind in MemoryKind)

    @property
    def summary(self) -> str:
        """The choices in words, for a log line."""
        return "; ".join(map(str, self.choices))

    def fit(self, kind: MemoryKind) -> Fit:
        """See :meth:`Channel.fit`."""
        return self._best(kind)[1]

    def move(self, movement: Movement, deadline: Deadline) -> str:
        """See :meth:`Channel.move`.

        Raises:
            LLMFeatureNotEnabledError: No transport of this link can move this kind of memory.
        """
        name, fit = self._best(movement.kind, movement)
        if not fit.level:
            raise error_for(
                LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                f"no transport of this link moves bytes between {movement.local_device} and the"
                f" peer's {movement.remote_device}: {fit.reason}",
                remedy="LLMDataDist.links() shows what a link can do, `python -m"
                " llm_datadist_torch doctor` what this machine can.",
            )
        return self._channels[name].move(movement, deadline)

    def read_words(self, region: RegionView, offset: int) -> tuple[int, int] | None:
        """See :meth:`Channel.read_words`; the first channel that can."""
        answers = (channel.read_words(region, offset) for channel in self._channels.values())
        return next((words for words in answers if words is not None), None)

    def asks_owner(self, way: str) -> bool:
        """See :meth:`Channel.asks_owner`."""
        return any(channel.asks_owner(way) for channel in self._channels.values())

    def serve_by(
        self,
        transport: str,
        payload: bytes,
        cache: LeasedCache,
        reply: Callable[[bytes | LLMException], None],
    ) -> None:
        """See :meth:`Channel.serve`.

        Raises:
            LLMFeatureNotEnabledError: This side does not have the transport.
        """
        self._named(transport).serve(payload, cache, reply)

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
        """See :meth:`Channel.forget`."""
        for channel in self._channels.values():
            channel.forget(region_id)

    def close(self) -> None:
        """See :meth:`Channel.close`."""
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
        with contextlib.ExitStack() as undo:
            for span in spans:
                for transport in self._registering(span):
                    try:
                        transport.register(span)
                    except LLMException as error:
                        if not self._movable_unregistered(span):
                            raise
                        logger.warning("peers can't reach it by %s: %s", transport.name, error)
                        continue
                    undo.callback(transport.unregister, span)
            undo.pop_all()

    def unregister(self, spans: Iterable[MemorySpan]) -> None:
        """Take back what :meth:`register` did for these spans."""
        for span in spans:
            for transport in self._registering(span):
                transport.unregister(span)

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

    def _registering(self, span: MemorySpan) -> list[Transport]:
        return [
            transport
            for transport in self._transports.values()
            if transport.capabilities.needs_registration
            and (
                transport.capabilities.host_memory
                if span.kind is MemoryKind.HOST
                else transport.capabilities.device_memory
            )
        ]
