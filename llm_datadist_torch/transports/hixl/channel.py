# SPDX-License-Identifier: Apache-2.0
"""The way to one peer through HIXL."""

from __future__ import annotations

import threading

from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.transports.base import (
    Channel,
    Fit,
    MemoryKind,
    Movement,
    RegionView,
    timed_out,
)
from llm_datadist_torch.transports.hixl.connection import Connection
from llm_datadist_torch.transports.hixl.engine import HixlEngine
from llm_datadist_torch.transports.hixl.registrations import Registrations
from llm_datadist_torch.transports.hixl.transfers import Requests
from llm_datadist_torch.transports.turns import Turns
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import LLMNotLinkedError, LLMPeerLostError, LLMStatusCode

_PATH = "hixl"


class HixlChannel(Channel):
    """Moves bytes by HIXL's asynchronous transfers, which never go through its staging buffers.

    One movement at a time: ending one breaks the connection, and whatever else is under way on it.

    Args:
        engine: Ours.
        memory: What is registered with it.
        connection: To the peer's engine.
    """

    def __init__(self, engine: HixlEngine, memory: Registrations, connection: Connection) -> None:
        self._engine = engine
        self._memory = memory
        self._connection = connection
        self._closed = False
        self._turns = Turns()

    def fit(self, kind: MemoryKind) -> Fit:  # noqa: ARG002
        """It moves every kind of registered memory."""
        return Fit.good(f"Ascend cluster, {self._connection.remote}")

    def move(self, movement: Movement, deadline: Deadline) -> str:
        """See :meth:`Channel.move`.

        HIXL can't cancel: when time is up the connection is broken, which ends its transfers, and
        only then does this return; it is made anew in the background.

        Raises:
            LLMParamError: Memory that is not registered.
        """
        self._check_ranges(movement)
        ticket = threading.Lock()
        with ticket:
            if not self._turns.wait(ticket, deadline):
                raise timed_out(deadline)
            try:
                self._attempt(movement, deadline)
            except LLMNotLinkedError:
                # HIXL drops connections of its own accord (heartbeats): once more with a fresh one.
                self._check_open()
                self._attempt(movement, deadline)
        return _PATH

    def _attempt(self, movement: Movement, deadline: Deadline) -> None:
        self._check_open()
        number = self._connection.ensure(deadline)
        requests = Requests(self._engine, self._connection.remote, deadline, self._check_open)
        with self._engine.on_device():
            try:
                requests.run(movement)
            except BaseException:
                # Whatever it was (Ctrl-C too): nothing may write to our memory when we are gone.
                self._connection.abandon(number, reconnect=not self._closed)
                raise

    def _check_ranges(self, movement: Movement) -> None:
        """HIXL itself would take an address that it does not know for something else."""
        if not self._memory.cover(movement.local_addrs, movement.local_extent):
            raise param_error(
                "the local memory is not registered with HIXL",
                remedy="allocate the cache here, or register it with remote_accessible=True.",
            )
        region = movement.region
        if region is not None and not _inside(movement, region, movement.remote_extent):
            raise param_error("the transfer leaves the peer's memory")

    def _check_open(self) -> None:
        if self._closed:
            raise LLMPeerLostError(
                "the link ended during the transfer", status_code=LLMStatusCode.LLM_NOT_YET_LINK
            )

    def forget(self, region_id: int) -> None:
        """Nothing is set up per region of the peer."""

    def close(self) -> None:
        """Disconnect in the background; a movement under way notices, and ends first."""
        if not self._closed:
            self._closed = True
            self._connection.leave()


def _inside(movement: Movement, region: RegionView, extent: int) -> bool:
    first, last = int(movement.remote_addrs.min()), int(movement.remote_addrs.max())
    return region.address <= first and last + extent <= region.address + region.nbytes
