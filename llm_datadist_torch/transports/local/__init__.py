# SPDX-License-Identifier: Apache-2.0
"""The embedded transport for one host.

Shared mappings, process memory, plain copies in one process, and a relay as the last resort.
"""

from __future__ import annotations

import msgspec
import torch

from llm_datadist_torch.transports.base import Capabilities, Channel, Relay, Transport
from llm_datadist_torch.transports.local.channel import LocalChannel
from llm_datadist_torch.transports.local.host import HostIdentity, allow_ptrace
from llm_datadist_torch.values.config import EngineConfig


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
        if config.allow_ptrace:
            allow_ptrace()
        self._identity = HostIdentity.of_this_process()

    @classmethod
    def availability(cls, config: EngineConfig, device: torch.device) -> str | None:  # noqa: ARG003
        """It needs nothing but the kernel."""
        return None

    def offer(self) -> bytes:
        """This process's identity."""
        return msgspec.msgpack.encode(self._identity)

    def connect(self, offer: bytes, relay: Relay) -> Channel:
        """A channel with every path that may work; which one does shows with the first movement."""
        return LocalChannel(self._identity, msgspec.msgpack.decode(offer, type=HostIdentity), relay)

    def close(self) -> None:
        """Nothing is held."""
