# SPDX-License-Identifier: Apache-2.0
"""The transport between hosts without an Ascend cluster: NIXL over UCX, for host memory."""

from __future__ import annotations

import ipaddress
import threading
import weakref

import msgspec
import torch

from llm_datadist_torch.transports.base import Capabilities, MemorySpan, Relay, Transport
from llm_datadist_torch.transports.local.host import HostIdentity
from llm_datadist_torch.transports.nixl.channel import NixlChannel
from llm_datadist_torch.transports.nixl.engine import why_not_installed
from llm_datadist_torch.transports.nixl.spans import Spans
from llm_datadist_torch.values.config import EngineConfig

_END_S = 5.0


class NixlTransport(Transport):
    """Moves host memory by NIXL's writes: a pull is a write by the owner.

    NIXL's reads are not used. Over TCP UCX emulates them, and the owner's process aborts when a
    reader ends in the middle of one, or faults when it reads what has been unmapped.

    Nothing of NIXL is imported or started before the first movement of a link.
    """

    name = "nixl"
    preference = 40
    capabilities = Capabilities(
        host_memory=True,
        device_memory=False,
        same_process=True,
        same_host=True,
        between_hosts=True,
        cancel=False,
        needs_registration=True,
    )

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._host = HostIdentity.of_this_process()
        self._memory = Spans()
        self._lock = threading.Lock()
        self._channels: weakref.WeakSet[NixlChannel] = weakref.WeakSet()

    @classmethod
    def availability(cls, config: EngineConfig, device: torch.device) -> str | None:  # noqa: ARG003
        """It needs NIXL's package, which is looked for, not imported; and other hosts."""
        reason = why_not_installed()
        if reason is None and config.transport != cls.name and _on_loopback(config):
            return (
                "no other host reaches this instance, because listen_ip_info is a loopback address,"
                f' and within a host `local` is better; LLMConfig.transport = "{cls.name}" has it'
                " all the same"
            )
        return reason

    def offer(self) -> bytes:
        """This process's identity; agents' addresses go with each request."""
        return msgspec.msgpack.encode(self._host)

    def connect(self, offer: bytes, relay: Relay) -> NixlChannel:
        """A channel; its agents start when they are needed."""
        peer = msgspec.msgpack.decode(offer, type=HostIdentity)
        where = "same host" if peer.boot_id == self._host.boot_id else "between hosts"
        channel = NixlChannel(self._memory, relay, f"UCX, {where}")
        with self._lock:
            self._channels.add(channel)
        return channel

    def register(self, span: MemorySpan) -> None:
        """See :meth:`Transport.register`; agents register it when they first move it."""
        self._memory.add(span)

    def unregister(self, span: MemorySpan) -> None:
        """See :meth:`Transport.unregister`."""
        if self._memory.remove(span) and self._channels:
            for channel in self._all():
                channel.drop(span)

    def close(self) -> None:
        """Wait until the channels, which are closed, have ended their agents; idempotent."""
        for channel in self._all():
            channel.join(_END_S)

    def _all(self) -> list[NixlChannel]:
        with self._lock:
            return list(self._channels)


def _on_loopback(config: EngineConfig) -> bool:
    return config.listen is not None and ipaddress.ip_address(config.listen[0]).is_loopback
