# SPDX-License-Identifier: Apache-2.0
"""The way to one peer through HIXL."""

from __future__ import annotations

import threading
import time

from llm_datadist_torch.transports.base import (
    Channel,
    Fit,
    MemoryKind,
    Movement,
    PathUnavailable,
    RegionView,
    Relay,
    timed_out,
)
from llm_datadist_torch.transports.hixl import messages
from llm_datadist_torch.transports.hixl.connection import Connection, Generations
from llm_datadist_torch.transports.hixl.engine import HixlEngine
from llm_datadist_torch.transports.hixl.ranges import RegisteredRange
from llm_datadist_torch.transports.hixl.registrations import Registrations
from llm_datadist_torch.transports.hixl.transfers import Requests
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import (
    LLMException,
    LLMNotLinkedError,
    LLMPeerLostError,
    LLMStatusCode,
    error_for,
)

NAME = "hixl"
_QUERY_POLL_S = 0.0005
PATIENCE_S = 10.0
"""For how long a peer that deregisters memory keeps us from connecting, at most."""


class HixlChannel(Channel):
    """Moves bytes by HIXL's asynchronous transfers, which never go through its staging buffers.

    Args:
        engine: Ours.
        memory: What is registered with it.
        connection: To the peer's engine.
        relay: The control connection.

    Attributes:
        peer_connects: The peer has asked what is registered here, so it may be connected.
    """

    def __init__(
        self, engine: HixlEngine, memory: Registrations, connection: Connection, relay: Relay
    ) -> None:
        self._engine = engine
        self._memory = memory
        self._connection = connection
        self._relay = relay
        self._asked = False
        self._telling = threading.Lock()
        self.peer_connects = False
        self._peer_disconnected = threading.Event()
        self._closed = False
        connection.forget_peer()

    def fit(self, kind: MemoryKind) -> Fit:  # noqa: ARG002
        """It moves every kind of registered memory."""
        return Fit.good(f"Ascend cluster, {self._connection.remote}")

    def move(self, movement: Movement, deadline: Deadline) -> str:
        """See :meth:`Channel.move`.

        HIXL can't cancel: when time is up the connection is broken, which ends its transfers, and
        only then does this return; it is made again in the background.

        Raises:
            PathUnavailable: The connection does not reach this memory yet, or HIXL not at all. The
                connection is renewed in the background.
        """
        self._ask_once()
        if self._connection.peer_table is not None:
            needed = self._needed(movement)
            if needed is None or not self._connection.serves(needed):
                raise PathUnavailable("HIXL's connection does not reach this memory now")
        return self.move_at_last(movement, deadline)

    def move_at_last(self, movement: Movement, deadline: Deadline) -> str:
        """See :meth:`Channel.move_at_last`: waits until the connection is renewed.

        Raises:
            LLMParamError: Memory that is not registered.
        """
        region = movement.region
        if region is not None and not _inside(movement, region):
            raise param_error("the transfer leaves the peer's memory")
        needed = self._needed_to_move(movement, deadline)
        if not self._attempt(movement, needed, deadline):
            # HIXL drops connections of its own accord (heartbeats), and another movement that
            # timed out breaks ours: once more with a fresh one.
            self._check_open()
            if not self._attempt(movement, needed, deadline):
                raise error_for(
                    LLMStatusCode.LLM_NOT_YET_LINK,
                    f"HIXL's connection to {self._connection.remote} broke twice",
                )
        return NAME

    def _attempt(self, movement: Movement, needed: Generations, deadline: Deadline) -> bool:
        """Returns False if the connection was lost, which was not this movement's fault."""
        self._check_open()
        with self._connection.using(needed, deadline) as number:
            requests = Requests(self._engine, self._connection.remote, deadline, self._check_open)
            with self._engine.on_device():
                try:
                    requests.run(movement)
                except BaseException as error:
                    # Whatever it was (Ctrl-C too): nothing may write to our memory when we are
                    # gone.
                    was_broken = self._connection.broken_since(number)
                    self._connection.abandon(number, reconnect=not self._closed)
                    lost = was_broken and isinstance(error, LLMException)
                    if lost or isinstance(error, LLMNotLinkedError):
                        return False
                    raise
        return True

    def _needed_to_move(self, movement: Movement, deadline: Deadline) -> Generations:
        """What the connection must reach; asks the peer what it has registered, once per link.

        Raises:
            LLMParamError: HIXL itself would take an address that it does not know for something
                else.
        """
        self._ask_once()
        while self._connection.peer_table is None:
            self._check_open()
            if deadline.expired:
                raise timed_out(deadline)
            time.sleep(_QUERY_POLL_S)
        needed = self._needed(movement)
        if needed is not None:
            return needed
        if self._memory.table.generation_of(movement.local_addrs, movement.local_extent) is None:
            raise param_error(
                "the local memory is not registered with HIXL",
                remedy="allocate the cache here, or register it with remote_accessible=True.",
            )
        raise param_error(
            "the peer's memory is not registered with HIXL",
            remedy="the peer's log says why; between hosts the control connection moves it if"
            " LLMConfig.transport is unset.",
        )

    def _needed(self, movement: Movement) -> Generations | None:
        """None if some of the memory is not registered."""
        local_end, remote_end = movement.local_extent, movement.remote_extent
        table = self._connection.peer_table
        local = self._memory.table.generation_of(movement.local_addrs, local_end)
        if local is None or table is None:
            return None
        remote = table.generation_of(movement.remote_addrs, remote_end)
        return None if remote is None else Generations(local, remote)

    # -- talking to the peer's channel ------------------------------------------------------------

    def _ask_once(self) -> None:
        if not self._asked:
            self._asked = True
            self._say(messages.Query())

    def _say(self, message: messages.Message) -> None:
        self._relay.post(NAME, messages.encode(message))

    def tell_all(self) -> None:
        """Tell the peer all that is registered here, if it has ever asked."""
        with self._telling:
            if self.peer_connects and not self._closed:
                ranges = list(self._memory.ranges)
                generation = max((one.generation for one in ranges), default=0)
                self._say(messages.Registered(generation, ranges, whole=True))

    def tell_new(self, ranges: list[RegisteredRange]) -> None:
        """Tell the peer of new ranges, if it has ever asked."""
        with self._telling:
            if self.peer_connects and not self._closed:
                generation = max(one.generation for one in ranges)
                self._say(messages.Registered(generation, ranges, whole=False))

    def ask_to_disconnect(self) -> None:
        """Have the peer disconnect from our engine."""
        self._peer_disconnected.clear()
        if self.peer_connects and not self._closed:
            self._say(messages.Disconnect())

    @property
    def peer_may_be_connected(self) -> bool:
        """Whether the peer has not said, since it was asked to, that it has disconnected."""
        waiting = self.peer_connects and not self._peer_disconnected.is_set()
        return waiting and not self._closed

    def note(self, payload: bytes) -> None:
        """See :meth:`Channel.note`."""
        message = messages.decode(payload)
        if isinstance(message, messages.Query):
            self.peer_connects = True
            self.tell_all()
        elif isinstance(message, messages.Registered):
            self._connection.told(message)
        elif isinstance(message, messages.Disconnect):
            self._connection.suspend_for_peer(
                PATIENCE_S, lambda: self._say(messages.Disconnected())
            )
        else:
            self._peer_disconnected.set()

    def _check_open(self) -> None:
        if self._closed:
            raise LLMPeerLostError(
                "the link ended during the transfer", status_code=LLMStatusCode.LLM_NOT_YET_LINK
            )

    @property
    def closed(self) -> bool:
        """Whether the link has ended."""
        return self._closed

    def forget(self, region_id: int) -> None:
        """Nothing is set up per region of the peer."""

    def close(self) -> None:
        """Disconnect in the background; a movement under way notices, and ends first."""
        if not self._closed:
            self._closed = True
            self._connection.leave()


def _inside(movement: Movement, region: RegionView) -> bool:
    extent = movement.remote_extent
    first, last = int(movement.remote_addrs.min()), int(movement.remote_addrs.max())
    return region.address <= first and last + extent <= region.address + region.nbytes
