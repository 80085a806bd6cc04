# SPDX-License-Identifier: Apache-2.0
"""The way to one peer through NIXL."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import msgspec
import torch

from llm_datadist_torch.transports.base import (
    Channel,
    Direction,
    Fit,
    LeasedCache,
    MemoryKind,
    MemorySpan,
    Movement,
    PathUnavailable,
    Relay,
    timed_out,
)
from llm_datadist_torch.transports.nixl.messages import Asked, Expect, Fetch, Stop
from llm_datadist_torch.transports.nixl.port import Port
from llm_datadist_torch.transports.nixl.serving import Serving
from llm_datadist_torch.transports.nixl.spans import Spans
from llm_datadist_torch.transports.turns import Turns
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import (
    LLMCacheNotFoundError,
    LLMException,
    LLMNotLinkedError,
    LLMPeerLostError,
    LLMStatusCode,
    LLMTimeoutError,
)

_NAME = "nixl"
FETCH_RUNS = 1 << 18
"""Runs that one request names: 6 MiB of the 8 that a message may have."""

_asked = msgspec.msgpack.Decoder(Asked)
_told = msgspec.msgpack.Decoder(Stop)


class NixlChannel(Channel):
    """Moves bytes by NIXL's writes: a push is one of ours, for a pull we ask the owner for one.

    Each side has an agent of its own for each direction. A movement is ended by ending its agent,
    so of each direction one moves at a time. The owner checks every stretch of a pull against the
    leased cache.

    Args:
        memory: What is published here.
        relay: To the channel on the other side.
        reason: For :meth:`fit`.
    """

    # The owner takes part in every movement, and only for leased or claimed caches.
    validates_reads = True

    def __init__(self, memory: Spans, relay: Relay, reason: str) -> None:
        self._memory = memory
        self._relay = relay
        self._reason = reason
        self._closed = False
        self._turns = {direction: Turns() for direction in Direction}
        self._numbers = itertools.count(1)
        self._incoming = Port(receives=True)
        self._outgoing = Port(receives=False)
        self._serving = Serving(memory)

    def fit(self, kind: MemoryKind) -> Fit:
        """Host memory only."""
        if kind is not MemoryKind.HOST:
            return Fit.none("it moves host memory only")
        return Fit.good(self._reason)

    def move(self, movement: Movement, deadline: Deadline) -> str:
        """See :meth:`Channel.move`.

        Whatever ends it early ends the agent that receives or sends here, and only then it
        returns.

        Raises:
            LLMParamError: Memory that is not registered.
            PathUnavailable: Memory that was registered by bare addresses: it may be gone.
        """
        if movement.local_unowned or movement.remote_unowned:
            raise PathUnavailable(
                "nixl does not move memory that was registered by addresses, which nothing keeps in"
                " place: register tensors"
            )
        spans = self._memory.of(movement.local_addrs, movement.local_extent)
        move = self._pull if movement.direction is Direction.READ else self._push
        ticket = threading.Lock()
        with ticket:
            if not self._turns[movement.direction].wait(ticket, deadline):
                raise timed_out(deadline)
            try:
                move(movement, spans, deadline)
            except LLMNotLinkedError:
                # UCX's connection broke: try once more with fresh agents if the link is still up.
                self._check_open()
                move(movement, spans, deadline)
        return _NAME

    def _pull(self, movement: Movement, spans: list[MemorySpan], deadline: Deadline) -> None:
        local, remote, nbytes = movement.expanded()
        runs = torch.stack((remote, local, nbytes))
        number = next(self._numbers)
        try:
            self._check(deadline)
            self._incoming.register(spans)
            ticket = self._incoming.ticket(spans)
            for at in range(0, runs.shape[1], FETCH_RUNS):
                some = runs[:, at : at + FETCH_RUNS].numpy().tobytes()
                self._check(deadline)
                self._call(movement, Fetch(number, ticket, some), deadline)
        except LLMCacheNotFoundError:
            # The owner has refused to begin.
            raise
        except BaseException as error:
            # Whatever it was (Ctrl-C too): nothing may write to our memory when we are gone.
            self._incoming.abandon()
            self._post(Stop(number, failed=True))
            if isinstance(error, LLMTimeoutError):
                raise timed_out(deadline) from error
            raise

    def _push(self, movement: Movement, spans: list[MemorySpan], deadline: Deadline) -> None:
        number = next(self._numbers)
        failed = True
        try:
            self._check(deadline)
            ticket = self._call(movement, Expect(number), deadline)
            self._outgoing.register(spans)
            runs = torch.stack(movement.expanded())
            self._outgoing.write(ticket, runs, lambda: self._check(deadline))
            failed = False
        except LLMTimeoutError as error:
            raise timed_out(deadline) from error
        finally:
            self._post(Stop(number, failed))

    def _call(self, movement: Movement, said: Asked, deadline: Deadline) -> bytes:
        payload = msgspec.msgpack.encode(said)
        return self._relay.call(movement, _NAME, payload, deadline)

    def _post(self, said: Stop) -> None:
        self._relay.post(_NAME, msgspec.msgpack.encode(said))

    def _check(self, deadline: Deadline) -> None:
        self._check_open()
        if deadline.expired:
            raise timed_out(deadline)

    def _check_open(self) -> None:
        if self._closed:
            raise LLMPeerLostError(
                "the link ended during the transfer", status_code=LLMStatusCode.LLM_NOT_YET_LINK
            )

    def serve(
        self,
        payload: bytes,
        cache: LeasedCache,
        reply: Callable[[bytes | LLMException], None],
    ) -> None:
        """See :meth:`Channel.serve`."""
        self._serving.take(_asked.decode(payload), cache, reply)

    def note(self, payload: bytes) -> None:
        """See :meth:`Channel.note`."""
        self._serving.stop(_told.decode(payload))

    def drop(self, span: MemorySpan) -> None:
        """A published span is about to be freed."""
        for port in (self._incoming, self._outgoing):
            port.drop(span)
        self._serving.drop(span)

    def forget(self, region_id: int) -> None:
        """Nothing is set up per region of the peer."""

    def close(self) -> None:
        """End the agents, in the background; a movement under way notices, and ends first."""
        if not self._closed:
            self._closed = True
            self._serving.close(self._incoming, self._outgoing)

    def join(self, timeout_s: float) -> None:
        """Wait until what :meth:`close` began is done."""
        self._serving.join(timeout_s)
