# SPDX-License-Identifier: Apache-2.0
"""The embedded transport for one host.

Shared mappings, process memory, plain copies in one process, and a relay as the last resort.
"""

from __future__ import annotations

import logging

import msgspec

from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.transports.base import Channel, Movement, Relay, Transport
from llm_datadist_torch.transports.local.host import HostIdentity
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

    def __init__(self) -> None:
        self._identity = HostIdentity.of_this_process()

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
        self._peer = peer
        self._reported: set[str] = set()
        unreachable = peer.unreachable_from(here)
        relayed = Relayed(relay)
        self._ways: list[Way]
        if here == peer:
            self._ways = [SameProcess()]
        elif unreachable:
            self._ways = [relayed]
            self._report(
                relayed, f"{unreachable}: bytes go through the control connection, which is slow"
            )
        else:
            self._ways = [SharedMapping(peer), ProcessMemory(peer), relayed]

    def move(self, movement: Movement, deadline: Deadline) -> str:
        """See :meth:`Channel.move`; returns the name of the way that served."""
        if not movement.in_host_memory:
            raise error_for(
                LLMStatusCode.LLM_FAILED,
                f"the local transport moves host memory only, not between {movement.local_device}"
                f" and the peer's {movement.remote_device}",
            )
        for way in tuple(self._ways):
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

    def _report(self, way: Way, reason: str) -> None:
        if reason not in self._reported:
            self._reported.add(reason)
            logger.warning(
                "local transport, peer process %d, %s: %s", self._peer.pid, way.name, reason
            )

    def forget(self, region_id: int) -> None:
        """Unmap a region."""
        for way in self._ways:
            way.forget(region_id)

    def close(self) -> None:
        """Unmap everything."""
        for way in self._ways:
            way.close()
