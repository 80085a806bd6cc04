# SPDX-License-Identifier: Apache-2.0
"""The embedded transport for one host.

Shared mappings, process memory, plain copies in one process, and a relay as the last resort.
"""

from __future__ import annotations

import logging

import msgspec
import torch

from llm_datadist_torch.config import EngineConfig
from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.transports.base import (
    Capabilities,
    Channel,
    Fit,
    MemoryKind,
    Movement,
    RegionView,
    Relay,
    Transport,
)
from llm_datadist_torch.transports.local.host import HostIdentity
from llm_datadist_torch.transports.local.mappings import PeerMappings
from llm_datadist_torch.transports.local.ways import (
    ProcessMemory,
    Relayed,
    SameProcess,
    SharedMapping,
    Way,
    WayClosedError,
)
from llm_datadist_torch.values.status import LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")


class LocalTransport(Transport):
    """Moves bytes between the processes of one host, in C++."""

    name = "local"
    preference = 100
    capabilities = Capabilities(
        host_memory=True,
        device_memory=True,
        same_process=True,
        same_host=True,
        between_hosts=True,
        cancel=True,
        needs_registration=False,
    )

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._identity = HostIdentity.of_this_process()

    @classmethod
    def availability(cls, config: EngineConfig, device: torch.device) -> str | None:  # noqa: ARG003
        """It needs nothing but the kernel."""
        return None

    def offer(self) -> bytes:
        """This process's identity."""
        return msgspec.msgpack.encode(self._identity)

    def connect(self, offer: bytes, relay: Relay) -> Channel:
        """A channel with every way that may work; which one does shows with the first movement."""
        return LocalChannel(self._identity, msgspec.msgpack.decode(offer, type=HostIdentity), relay)

    def close(self) -> None:
        """Nothing is held."""


class LocalChannel(Channel):
    """Tries the ways in order; a way that the kernel forbids is reported once and then left out.

    Thread safety: movements come one at a time (the link's lock); ``forget`` and ``close`` may come
    at any time.
    """

    def __init__(self, here: HostIdentity, peer: HostIdentity, relay: Relay) -> None:
        neighbour = relay.neighbour
        self._same_process = neighbour is not None
        self._peer = peer = here if self._same_process else peer
        self._reported: set[str] = set()
        self._words = PeerMappings(peer.pid)
        self._unreachable = "" if self._same_process else peer.unreachable_from(here)
        self._relayed = relayed = Relayed(relay)
        self._ways: list[Way]
        if neighbour is not None:
            self._ways = [SameProcess(neighbour)]
        elif self._unreachable:
            self._ways = [relayed]
        else:
            self._ways = [SharedMapping(peer), ProcessMemory(peer), relayed]

    def fit(self, kind: MemoryKind) -> Fit:
        """Well inside one process, and host memory between processes.

        Where only the relay is left, as for device memory between processes, anything else is
        better.
        """
        if kind is not MemoryKind.HOST and not self._same_process:
            return Fit.last_resort("through the control connection, device memory")
        if isinstance(self._ways[0], Relayed):
            reason = self._unreachable or "the kernel forbids the other ways"
            return Fit.last_resort(f"through the control connection, {reason}")
        return Fit.good("same process" if self._same_process else "same host")

    def move(self, movement: Movement, deadline: Deadline) -> str:
        """See :meth:`Channel.move`; returns the name of the way that served."""
        ways = tuple(self._ways)
        if not movement.in_host_memory and not self._same_process:
            # The other ways reach what the host's processors can read.
            ways = (self._relayed,)
            self._report(
                self._relayed,
                "device memory goes through the control connection, which is slow; HIXL moves it"
                " faster, see LLMDataDist.links()",
            )
        for way in ways:
            if self._unreachable:
                self._report(
                    way,
                    f"{self._unreachable}: bytes go through the control connection, which is slow",
                )
            try:
                way.move(movement, deadline)
            except WayClosedError as reason:
                if reason.lasting:
                    self._ways.remove(way)
                    self._report(way, str(reason))
                else:
                    logger.debug("%s can't serve: %s", way.name, reason)
                continue
            return way.name
        raise error_for(
            LLMStatusCode.LLM_FAILED, f"no way to the memory of process {self._peer.pid}"
        )

    def read_words(self, region: RegionView, offset: int) -> tuple[int, int] | None:
        """See :meth:`Channel.read_words`: out of a mapping, so in nanoseconds."""
        return None if self._unreachable else self._words.read_words(region, offset)

    def asks_owner(self, way: str) -> bool:
        """The peer relays bytes only out of caches that are leased."""
        return way == Relayed.name

    def _report(self, way: Way, reason: str) -> None:
        if reason not in self._reported:
            self._reported.add(reason)
            logger.warning(
                "local transport, peer process %d, %s: %s", self._peer.pid, way.name, reason
            )

    def forget(self, region_id: int) -> None:
        """Unmap a region."""
        self._words.forget(region_id)
        for way in self._ways:
            way.forget(region_id)

    def close(self) -> None:
        """Unmap everything."""
        self._words.close()
        for way in self._ways:
            way.close()
