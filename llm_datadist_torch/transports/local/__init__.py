# SPDX-License-Identifier: Apache-2.0
"""The embedded transport for one host.

Shared mappings, process memory, device memory opened by AscendCL's keys, plain copies in one
process, and a relay as the last resort.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import msgspec
import torch

from llm_datadist_torch.transports.base import (
    Capabilities,
    Channel,
    MemoryKind,
    MemorySpan,
    Relay,
    Transport,
)
from llm_datadist_torch.transports.local.channel import LocalChannel
from llm_datadist_torch.transports.local.host import HostIdentity, LocalOffer, allow_ptrace
from llm_datadist_torch.transports.local.ipc import probe
from llm_datadist_torch.transports.local.ipc.exports import EXPORTS
from llm_datadist_torch.values.config import EngineConfig
from llm_datadist_torch.values.deadline import Deadline


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
        identity = HostIdentity.of_this_process()
        self._offer = LocalOffer(
            identity.boot_id,
            identity.pid_namespace,
            identity.pid,
            identity.start_time,
            probe.why_not(device),
        )
        # What other instances of this process have registered is not ours to end.
        self._registered: Counter[tuple[int, int]] = Counter()
        self._registered_lock = threading.Lock()

    @classmethod
    def availability(cls, config: EngineConfig, device: torch.device) -> str | None:  # noqa: ARG003
        """It needs nothing but the kernel."""
        return None

    def offer(self) -> bytes:
        """This process's identity, and whether it shares device memory."""
        return msgspec.msgpack.encode(self._offer)

    def connect(self, offer: bytes, relay: Relay) -> Channel:
        """A channel with every path that may work; which one does shows with the first movement."""
        peer = msgspec.msgpack.decode(offer, type=LocalOffer)
        return LocalChannel(self._offer, peer, relay, self._device)

    def registers(self, kind: MemoryKind) -> bool:
        """Of device memory it must know when it ends, because peers may have it open."""
        return kind is MemoryKind.DEVICE and not self._offer.no_ipc

    def register(self, span: MemorySpan) -> None:
        """See :meth:`Transport.register`."""
        with self._registered_lock:
            self._registered[span.address, span.nbytes] += 1
        EXPORTS.register(span)

    def unregister(self, span: MemorySpan) -> None:
        """See :meth:`Transport.unregister`."""
        if self._was_registered(span):
            EXPORTS.unregister(span)

    def wait_closed(self, spans: Sequence[MemorySpan], deadline: Deadline) -> None:
        """See :meth:`Transport.wait_closed`."""
        EXPORTS.wait_closed(spans, deadline)

    def retire(self, span: MemorySpan, keep: object) -> None:
        """See :meth:`Transport.retire`."""
        if self._was_registered(span):
            EXPORTS.retire(span, keep)

    def _was_registered(self, span: MemorySpan) -> bool:
        name = (span.address, span.nbytes)
        with self._registered_lock:
            count = self._registered.pop(name, 0)
            if count > 1:
                self._registered[name] = count - 1
            return count > 0

    def close(self) -> None:
        """Nothing is held: what peers have open outlives the instance."""
