# SPDX-License-Identifier: Apache-2.0
"""The transport for Ascend clusters: CANN's HIXL engine, through its Python module ``hixl``."""

from __future__ import annotations

import logging
import threading

import msgspec
import torch

from llm_datadist_torch.config import EngineConfig
from llm_datadist_torch.transports.base import (
    HOST_DEVICE,
    Capabilities,
    MemorySpan,
    Relay,
    Transport,
)
from llm_datadist_torch.transports.hixl.channel import HixlChannel
from llm_datadist_torch.transports.hixl.connection import Connection
from llm_datadist_torch.transports.hixl.engine import HixlEngine, import_hixl
from llm_datadist_torch.transports.hixl.registrations import Registrations
from llm_datadist_torch.values.status import LLMException

logger = logging.getLogger("llm_datadist_torch")

_ANY_ADDRESS = {"", "0.0.0.0", "::"}  # noqa: S104  to refuse them


class HixlOffer(msgspec.Struct, frozen=True, array_like=True):
    """What a peer must know.

    Attributes:
        engine: The address of the engine, spelt as HIXL wants to hear it.
    """

    engine: str


class HixlTransport(Transport):
    """Moves registered device and host memory between engines of one Ascend cluster.

    Unlike a link, HIXL's connections have one direction: each side that moves bytes connects to
    the other, with its first movement.
    """

    name = "hixl"
    preference = 50
    capabilities = Capabilities(
        host_memory=True,
        device_memory=True,
        same_process=True,
        same_host=True,
        between_hosts=True,
        cancel=False,
        needs_registration=True,
    )

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._engine = HixlEngine(config, device)
        self._memory = Registrations(self._engine)
        self._lock = threading.Lock()
        self._connections: dict[str, Connection] = {}
        self._closed = False

    @classmethod
    def availability(cls, config: EngineConfig, device: torch.device) -> str | None:
        """It needs CANN's module, an NPU, and an address to listen on."""
        try:
            import_hixl()
        except ImportError as error:
            return (
                f"the Python module hixl can't be imported ({error}): install CANN with HIXL and"
                " source its set_env.sh"
            )
        if device.type == HOST_DEVICE.type:
            return (
                "it needs an NPU, and Placement.DEVICE means the CPU here: install torch_npu, or"
                " see LLMConfig.device"
            )
        if config.listen is None or config.listen[0] in _ANY_ADDRESS:
            return (
                "its engine is named by the address that peers reach it at: set"
                ' LLMConfig.listen_ip_info = "ip:port" with this machine\'s address'
            )
        return None

    def offer(self) -> bytes:
        """The address of the engine."""
        return msgspec.msgpack.encode(HixlOffer(self._engine.address))

    def connect(self, offer: bytes, relay: Relay) -> HixlChannel:  # noqa: ARG002
        """A channel; HIXL connects with its first movement."""
        remote = msgspec.msgpack.decode(offer, type=HixlOffer).engine
        with self._lock:
            connection = self._connections.setdefault(remote, Connection(self._engine, remote))
        return HixlChannel(self._engine, self._memory, connection)

    def register(self, span: MemorySpan) -> None:
        """See :meth:`Transport.register`."""
        self._memory.add(span)

    def unregister(self, span: MemorySpan) -> None:
        """See :meth:`Transport.unregister`."""
        self._memory.remove(span)

    def close(self) -> None:
        """Disconnect, deregister and end the engine, in HIXL's order; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            connections = list(self._connections.values())
        for connection in connections:
            try:
                connection.close()
            except LLMException as error:
                logger.warning("%s", error)  # the end of the engine ends it, too
        self._memory.clear()
        self._engine.finalize()
