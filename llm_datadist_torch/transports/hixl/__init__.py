# SPDX-License-Identifier: Apache-2.0
"""The transport for Ascend clusters: CANN's HIXL engine, through its Python module ``hixl``."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable

import msgspec
import torch

from llm_datadist_torch.transports.base import (
    HOST_DEVICE,
    Capabilities,
    MemorySpan,
    Relay,
    Transport,
)
from llm_datadist_torch.transports.hixl.channel import HixlChannel
from llm_datadist_torch.transports.hixl.connection import OURS, Connection
from llm_datadist_torch.transports.hixl.engine import HixlEngine
from llm_datadist_torch.transports.hixl.messages import HixlOffer
from llm_datadist_torch.transports.hixl.ports import describe
from llm_datadist_torch.transports.hixl.registrations import Registrations
from llm_datadist_torch.values.config import EngineConfig
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMException

logger = logging.getLogger("llm_datadist_torch")

_QUIESCE_MS = 5_000
"""How long peers have to disconnect when memory is to be deregistered."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
"""Between attempts to deregister, when somebody stays connected."""
_POLL_S = 0.002


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
        self._memory = Registrations(self._engine, self._quiesce)
        self._lock = threading.Lock()
        self._connections: dict[str, Connection] = {}
        self._channels: weakref.WeakSet[HixlChannel] = weakref.WeakSet()
        self._quiescing = threading.Lock()
        self._deregistering = False
        self._end = threading.Event()
        self._ended = False

    @classmethod
    def availability(cls, config: EngineConfig, device: torch.device) -> str | None:  # noqa: ARG003
        """It needs CANN's HIXL and an NPU."""
        try:
            describe()
        except ImportError as error:
            return f"HIXL is not found ({error}): install CANN 8.5 or later, source its set_env.sh"
        if device.type == HOST_DEVICE.type:
            return (
                "it needs an NPU, and Placement.DEVICE means the CPU here: install torch_npu, or"
                " see LLMConfig.device"
            )
        return None

    def offer(self) -> bytes:
        """The address of the engine."""
        return msgspec.msgpack.encode(HixlOffer(self._engine.address))

    def connect(self, offer: bytes, relay: Relay) -> HixlChannel:
        """A channel; HIXL connects with its first movement."""
        remote = msgspec.msgpack.decode(offer, type=HixlOffer).engine
        with self._lock:
            connection = self._connections.get(remote)
            if connection is None:
                connection = Connection(self._engine, remote, self._memory)
                self._connections[remote] = connection
            channel = HixlChannel(self._engine, self._memory, connection, relay)
            self._channels.add(channel)
        return channel

    # -- memory -----------------------------------------------------------------------------------

    def register(self, span: MemorySpan) -> None:
        """See :meth:`Transport.register`."""
        new = self._memory.add(span)
        if new:
            for channel in self._open_channels():
                channel.tell_new(new)

    def unregister(self, span: MemorySpan) -> None:
        """See :meth:`Transport.unregister`; blocks until nobody is connected any more.

        The memory belongs to somebody who may free it as soon as this returns.
        """
        if self._memory.remove(span) and not self._quiesce():
            logger.warning(
                "%d bytes at %#x stay reachable by HIXL: somebody stays connected, and HIXL"
                " deregisters nothing meanwhile; register tensors instead of addresses, which are"
                " kept until they can be deregistered",
                span.nbytes,
                span.address,
            )
            self._deregister_later()

    def retire(self, span: MemorySpan, keep: object) -> None:
        """See :meth:`Transport.retire`."""
        if self._memory.remove(span, keep):
            self._deregister_later()

    def _deregister_later(self) -> None:
        if not self._may_be_connected() and self._memory.deregister_unused():
            self._tell_all()
            return
        with self._lock:
            if self._deregistering or self._end.is_set():
                return
            self._deregistering = True
        threading.Thread(
            target=self._deregister_in_background, name="llmdd-hixl-deregister", daemon=True
        ).start()

    def _deregister_in_background(self) -> None:
        pause = _FIRST_PAUSE_S
        try:
            while not self._end.is_set() and not self._quiesce():
                self._end.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        finally:
            self._deregistering = False
        if self._memory.has_unused:  # something came between the attempt and that line
            self._deregister_later()

    def _quiesce(self) -> bool:
        """Deregister what has no users any more; blocks until nobody is connected meanwhile.

        Movements under way are waited for, here and at the peers; new ones go by another path, or
        wait.

        Returns:
            False if somebody stays connected.
        """
        deadline = Deadline.after_ms(_QUIESCE_MS)
        with self._quiescing:
            if not self._may_be_connected() and self._memory.deregister_unused():
                self._tell_all()
                return True
            with self._lock:
                connections = list(self._connections.values())
            channels = self._open_channels()
            try:
                for channel in channels:
                    channel.ask_to_disconnect()
                held = [connection.suspend(OURS, deadline) for connection in connections]
                if not all(held):
                    return False
                # The engine itself knows best, but releases before CANN 9.0 don't refuse.
                return _until(
                    lambda: (
                        not any(channel.peer_may_be_connected for channel in channels)
                        and self._memory.deregister_unused()
                    ),
                    deadline,
                )
            finally:
                for connection in connections:
                    connection.resume(OURS)
                self._tell_all()

    def _may_be_connected(self) -> bool:
        with self._lock:
            connections = list(self._connections.values())
        return any(connection.is_up for connection in connections) or any(
            channel.peer_connects for channel in self._open_channels()
        )

    def _open_channels(self) -> list[HixlChannel]:
        with self._lock:
            return [channel for channel in self._channels if not channel.closed]

    def _tell_all(self) -> None:
        for channel in self._open_channels():
            channel.tell_all()

    def close(self) -> None:
        """Disconnect, deregister and end the engine, in HIXL's order; idempotent."""
        with self._lock:
            if self._ended:
                return
            self._end.set()
            connections = list(self._connections.values())
        for connection in connections:
            try:
                connection.close()
            except LLMException as error:
                logger.warning("%s", error)  # the end of the engine ends it, too
        self._memory.clear()
        self._engine.finalize()
        # Not before: a close that was interrupted is called again.
        self._ended = True


def _until(condition: Callable[[], bool], deadline: Deadline) -> bool:
    while not condition():
        if deadline.expired:
            return False
        time.sleep(_POLL_S)
    return True
