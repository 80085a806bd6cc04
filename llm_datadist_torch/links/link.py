# SPDX-License-Identifier: Apache-2.0
"""One link: the requests that are under way on it, and the peer's leases on our caches."""

from __future__ import annotations

import errno
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import torch

from llm_datadist_torch.links import held_leases
from llm_datadist_torch.links.held_leases import HeldLeases, LeaseTicket
from llm_datadist_torch.links.known_caches import KnownCaches
from llm_datadist_torch.links.questions import TOLD_AT_ONCE
from llm_datadist_torch.links.transfers import LinkTransfers
from llm_datadist_torch.net.connection import Data
from llm_datadist_torch.net.endpoint import Endpoint
from llm_datadist_torch.net.process import PeerProcess
from llm_datadist_torch.serving.messages import (
    Body,
    CacheView,
    Call,
    Called,
    Claim,
    Done,
    Envelope,
    Note,
    Question,
    ReadBytes,
    Refused,
    Release,
    Resolve,
    ShareRegion,
    WriteBytes,
    decode,
    encode,
)
from llm_datadist_torch.serving.peer import LinkState, ServedPeer
from llm_datadist_torch.transports.base import RegionView, SameProcessPeer
from llm_datadist_torch.transports.choice import LinkChannel
from llm_datadist_torch.transports.movement import Movement
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import (
    LLMException,
    LLMPeerLostError,
    LLMStatusCode,
    code_2_status,
    error_for,
    message_of,
)

_ANSWERED_AT_ONCE = (Resolve, Call, Question)
"""Requests whose answer a thread takes by itself: peers mostly answer them in microseconds."""
_TAKE_NS = 1_000_000
"""How long it waits for that; a later answer comes by the I/O thread."""
_LEASES_RETRY_S = 0.002
_NO_ANSWER = None, None
SHARE_IT = "give all instances the same LLMConfig.link_secret, or none of them."
_DESCRIPTOR_MS = 2000
"""Longest that a peer is waited for that was asked for a descriptor."""


class Pending:
    """An answer that a thread waits for.

    Args:
        ticket: The ticket that a lease in the answer belongs to.
    """

    def __init__(self, ticket: LeaseTicket | None = None) -> None:
        self.ticket = None if ticket is None else weakref.ref(ticket)
        self._arrived = threading.Lock()
        self._arrived.acquire()
        self._answer: tuple[Body | LLMException, Data | None] | None = None

    def set(self, answer: Body | LLMException, data: Data | None = None) -> None:
        """Hand over the answer; only the first counts."""
        if self._answer is None:
            self._answer = (answer, data)
            self._arrived.release()

    @property
    def answer(self) -> tuple[Body | LLMException, Data | None] | None:
        """What has arrived so far."""
        return self._answer

    def wait(self, deadline: Deadline) -> tuple[Body | LLMException, Data | None] | None:
        """The answer, or None when the deadline has passed."""
        if self._answer is None and self._arrived.acquire(timeout=deadline.remaining_s()):
            # Another thread may wait, too.
            self._arrived.release()
        return self._answer


class RelinkTurn:
    """The right to relink a lost link, which a thread has while it keeps this object.

    Ctrl-C may come between any two steps, also between taking a lock and noting that it is taken.
    So the right ends with this object, however its thread is interrupted.

    Attributes:
        ended: It has been given back.
    """

    __slots__ = ("__weakref__", "ended")

    def __init__(self) -> None:
        self.ended = False


@dataclass(eq=False)
class RelinkState:
    """The state of relinking a lost link.

    Attributes:
        lock: For ``turn``.
        turn: The turn of the thread that tries now, until it has ended or was collected.
        retry_at: The next try is not before this, on the monotonic clock.
        pause_s: How long to wait after the next try that fails.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    turn: weakref.ref[RelinkTurn] | None = None
    retry_at: float = 0.0
    pause_s: float = 0.01


@dataclass(eq=False)
class Link(ServedPeer):
    """The live relation to one peer.

    Thread safety: ``request`` and ``post`` may be called from any thread, and transfers run side by
    side; see :class:`ServedPeer` for the rest.

    Attributes:
        endpoint: What sends them.
        dialed: Whether we called ``link_clusters`` (else the peer did).
        address: Host and port at which the peer can be dialed again; None if we don't know.
        since: When it came into its state, as ``time.time()`` has it.
        owners: What it is kept for: "" for ``link_clusters``, and tokens of communicators. The link
            ends with the last; changed by the registry only.
        unlinking: This side is asking the peer to unlink.
        ended_by: Why the connection ended while this side was asking; "" if it did not.
        known: What the peer has said of its caches, in remote-accessible mode.
        transfers: The transfers that this side runs on it.
        relink: The state of relinking, once the link is lost.
        give_back_late: Gives back a lease whose connection has ended.
        link_end: Our end of it, for a peer in this process to find; kept for as long as the link.
        same_process_peer: The peer, where it is in this process.
        held: The leases on the peer's caches that transfers of ours have.
        sweeping: The I/O thread looks every ``SWEEP_S`` for what interrupted threads have left.
    """

    endpoint: Endpoint
    dialed: bool
    address: tuple[str, int] | None = None
    lost_because: str = ""
    since: float = field(default_factory=time.time)
    owners: set[str] = field(default_factory=set)
    unlinking: bool = False
    ended_by: str = ""
    known: KnownCaches = field(default_factory=KnownCaches)
    transfers: LinkTransfers = field(default_factory=LinkTransfers)
    relink: RelinkState = field(default_factory=RelinkState)
    give_back_late: Callable[[Link, Release], None] | None = None
    link_end: object = None
    same_process_peer: SameProcessPeer | None = None
    held: HeldLeases = field(default_factory=HeldLeases)
    sweeping: bool = False
    _channel: LinkChannel | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pending: dict[int, Pending] = field(default_factory=dict)
    _asking: threading.Lock = field(default_factory=threading.Lock)
    _told: list[Pending] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def channel(self) -> LinkChannel:
        """What moves bytes between the peer's memory and ours; set when the link is made."""
        if self._channel is None:
            raise error_for(LLMStatusCode.LLM_NOT_YET_LINK, "the link is not ready", peer=self.peer)
        return self._channel

    def open_channel(self, channel: LinkChannel) -> None:
        """Set the channel, once."""
        self._channel = channel

    # -- talking ----------------------------------------------------------------------------------

    def post(self, body: Body) -> None:
        """Send a message that wants no answer. Does not block.

        A lease goes back on the next link to the peer where this one's connection has ended.
        """
        late = self.give_back_late
        if late is not None and isinstance(body, Release) and self.connection.closed:
            late(self, body)
        else:
            self.connection.send(encode(Envelope(0, False, body)))

    def request(
        self,
        body: Body,
        deadline: Deadline,
        data: bytes | memoryview | None = None,
        ticket: LeaseTicket | None = None,
    ) -> tuple[Body, Data | None]:
        """Send a request and wait for its answer.

        A lease that comes with it is the ``ticket``'s, to be given back by :meth:`give_back`.

        Raises:
            LLMTimeoutError: No answer in time.
            LLMPeerLostError: The connection is gone, or goes while we wait.
            LLMException: The peer refused, with its status and text.
        """
        pending, number = Pending(ticket), next(self._numbers)
        with self._lock:
            self.check_linked()
            self._pending[number] = pending
        self.connection.send(encode(Envelope(number, False, body)), data)
        try:
            if isinstance(body, _ANSWERED_AT_ONCE):
                if not self.sweeping:
                    # In this order: where an interrupt comes in between, the next request does it.
                    self.endpoint.loop.submit(self._sweep)
                    self.sweeping = True
                answers = self.connection.answers
                if answers is not None and (message := answers.take(number, _TAKE_NS)) is not None:
                    # What the I/O thread does with an answer. Where an interrupt, or a message
                    # without sense, cuts this off, it does so after a while.
                    with suppress(msgspec.DecodeError):
                        self.on_reply(number, decode(message).body, None)
                        answers.confirm(number)
            answer = pending.wait(deadline)
        finally:
            # Also after Ctrl-C: an answer that comes from now on finds nobody, and its lease goes
            # back at once.
            with self._lock:
                self._pending.pop(number, None)
        # The answer may have come in the last moment, between the two.
        reply, payload = answer or pending.answer or _NO_ANSWER
        if reply is None or isinstance(reply, (LLMException, Refused)):
            try:
                raise self.error_of(reply, deadline)
            finally:
                # The error knows this frame, and its callers' caches: without this they would be
                # kept until the garbage collector finds the cycle.
                del reply, answer, pending
        return reply, payload

    def begin(
        self, body: Body, deadline: Deadline, data: bytes | memoryview | None = None
    ) -> Request:
        """Send a request whose answer is waited for later, so that others can follow at once.

        Does not block. The answer is ``Done``, and ``data`` must not change before it has come.

        Raises:
            LLMPeerLostError: The connection is gone.
        """
        pending, number = Pending(), next(self._numbers)
        with self._lock:
            self.check_linked()
            self._pending[number] = pending
        self.connection.send(encode(Envelope(number, False, body)), data)
        return Request(self, number, pending, deadline)

    def forget(self, number: int) -> None:
        """Want no answer to this request any more."""
        with self._lock:
            self._pending.pop(number, None)

    def error_of(self, reply: LLMException | Refused | None, deadline: Deadline) -> LLMException:
        """What the call is told whose request came to this; None is no answer in time."""
        if isinstance(reply, LLMException):
            return reply
        if reply is not None:
            return error_for(code_2_status(reply.status), reply.text, peer=self.peer)
        return error_for(
            LLMStatusCode.LLM_TIMEOUT,
            f"cluster {self.peer} did not answer within {deadline.budget_ms} ms",
            peer=self.peer,
            remedy="the link stays usable; raise sync_kv_timeout if the peer is only busy.",
        )

    def unexpected(self, reply: Body) -> LLMException:
        """What the call is told whose request was answered by something else than it asks for."""
        text = f"unexpected answer {type(reply).__name__}"
        return error_for(LLMStatusCode.LLM_FAILED, text, peer=self.peer)

    def send(self, body: Body, deadline: Deadline) -> None:
        """Send a request whose answer nobody waits for.

        Blocks while the peer has ``TOLD_AT_ONCE`` of them to deal with, so that one that is slow
        slows the sender down.

        Raises:
            LLMTimeoutError: It took until the deadline.
            LLMPeerLostError: The connection is gone.
        """
        while len(self._told) >= TOLD_AT_ONCE:
            oldest = self._told[0]
            if oldest.wait(deadline) is None:
                raise error_for(
                    LLMStatusCode.LLM_TIMEOUT,
                    f"cluster {self.peer} did not deal with {TOLD_AT_ONCE} earlier messages within"
                    f" {deadline.budget_ms} ms",
                    peer=self.peer,
                    remedy="make its handler faster, or raise sync_kv_timeout.",
                )
            with suppress(ValueError):
                self._told.remove(oldest)
        pending, number = Pending(), next(self._numbers)
        with self._lock:
            self.check_linked()
            self._pending[number] = pending
            self._told.append(pending)
        self.connection.send(encode(Envelope(number, False, body)))

    def ask_for_region(self, region_id: int) -> int:
        """Have the peer send a descriptor of a region; it is owned by the caller.

        Raises:
            OSError: None has come: the peer refuses or does not answer in time, the connection
                can't carry descriptors, or this process may have no more of them.
        """
        # One at a time: the next descriptor that comes is the one that was asked for.
        with self._asking:
            self.connection.expect_descriptors(1)
            try:
                self.request(ShareRegion(region_id), Deadline.after_ms(_DESCRIPTOR_MS))
            except LLMException as error:
                raise OSError(errno.EACCES, message_of(error)) from error
            finally:
                descriptor = self.connection.take_descriptor()
        if descriptor < 0:
            raise OSError(errno.EMFILE, "no descriptor has come with the peer's answer")
        return descriptor

    def on_reply(self, number: int, body: Body, data: Data | None) -> None:
        """An answer has arrived."""
        with self._lock:
            pending = self._pending.pop(number, None)
            held = None if pending is None else pending.ticket
            gone = isinstance(body, CacheView) and not self.held.note(body.lease_id, held)
            if pending is not None:
                pending.set(body, data)
        if gone and isinstance(body, CacheView):
            self.post(Release(body.lease_id, None))

    def give_back(self, ticket: LeaseTicket, fetched: tuple[int, int] | None) -> None:
        """Give back a lease that was asked for by :meth:`request`, if it has come.

        Also to a peer that has ended or lost the link: it may keep what we used until we say so.
        Does not block.
        """
        self.held.give_back(ticket, fetched, self.post)

    def _sweep(self) -> None:
        """Finish what threads were interrupted in, until nothing is under way: the I/O thread."""
        # First of all: a request that begins after this is seen below, or sets it again.
        self.sweeping = False
        young = self.connection.deliver_unconfirmed(held_leases.SWEEP_S)
        self.held.sweep(self.post)
        if young or self._pending or self.held.any:
            self.sweeping = True
            timers = self.endpoint.loop.timers
            timers.set(self._sweep, [time.monotonic() + held_leases.SWEEP_S])

    def check_linked(self) -> None:
        """Raise unless the link is up.

        Raises:
            LLMPeerLostError: It was lost or unlinked.
        """
        if self.state is not LinkState.LINKED or self.ended_by:
            state = "lost" if self.state is LinkState.LINKED else self.state.value
            raise LLMPeerLostError(
                f"the link to cluster {self.peer} is {state}: {self.lost_because or self.ended_by}",
                status_code=LLMStatusCode.LLM_NOT_YET_LINK,
                peer=self.peer,
                remedy="call link_clusters() again when the peer is back.",
            )

    def end(self, state: LinkState, reason: str) -> bool:
        """Leave the linked state: all waiting threads get a typed error, and the channel is closed.

        Returns:
            Whether it was linked until now.
        """
        with self._lock:
            was_linked = self.state is LinkState.LINKED
            if was_linked:
                self.state, self.lost_because, self.since = state, reason, time.time()
        # Once more if it had ended: Ctrl-C may have kept the thread that ended it from this.
        self._fail_pending(f"{state.value} meanwhile: {reason}")
        if self._channel is not None:
            self._channel.close()
        return was_linked

    def connection_ended(self, reason: str) -> None:
        """The connection has ended while this side was asking to unlink: no answer comes."""
        self.ended_by = reason
        self._fail_pending(f"lost meanwhile: {reason}")

    def _fail_pending(self, what: str) -> None:
        error = LLMPeerLostError(
            f"the link to cluster {self.peer} was {what}",
            status_code=LLMStatusCode.LLM_NOT_YET_LINK,
            peer=self.peer,
            remedy="call link_clusters() again when the peer is back.",
        )
        with self._lock:
            for pending in self._pending.values():
                pending.set(error)
            self._pending.clear()

    # -- transfers --------------------------------------------------------------------------------

    def stop_transfers(self, ticket: threading.Lock, deadline: Deadline) -> None:
        """Let no transfer of this side start while ``ticket``, which the caller holds, is locked.

        Blocks until those that run have ended; see :class:`LinkTransfers`.

        Raises:
            LLMTimeoutError: They did not end until the deadline.
        """
        if not self.transfers.stop(ticket, deadline):
            raise error_for(
                LLMStatusCode.LLM_TIMEOUT,
                f"transfers with cluster {self.peer} took all of {deadline.budget_ms} ms",
                peer=self.peer,
            )

    def hang_up(self) -> None:
        """Close the connection of a link that has ended, once no transfer of ours runs any more.

        To the peer the end of the connection says that we don't touch its memory any more. Does not
        block.
        """
        if self.transfers.idle:
            self.endpoint.drop(self.connection)
        else:
            threading.Thread(target=self._hang_up_later, name="llmdd-hang-up", daemon=True).start()

    def _hang_up_later(self) -> None:
        self.transfers.wait_until_idle()
        self.endpoint.drop(self.connection)

    def wait_for_leases(self, deadline: Deadline) -> bool:
        """Wait until the peer has given back its leases; whether it has."""
        while self.grants and not deadline.expired:
            time.sleep(_LEASES_RETRY_S)
        return not self.grants


class Request:
    """A request that is under way; see :meth:`Link.begin`. The thread that waits for it owns it."""

    def __init__(self, link: Link, number: int, pending: Pending, deadline: Deadline) -> None:
        self._link, self._number = link, number
        self._pending, self._deadline = pending, deadline

    def wait(self) -> Data | bytes:
        """Block for the answer; returns the bytes that come with it.

        Raises:
            LLMException: As :meth:`Link.request`; LLM_FAILED, the answer is not ``Done``.
        """
        try:
            self._pending.wait(self._deadline)
        finally:
            self.close()
        reply, data = self._pending.answer or _NO_ANSWER
        if reply is None or isinstance(reply, (LLMException, Refused)):
            self._pending = Pending()  # as in Link.request: no cycle with the error
            try:
                raise self._link.error_of(reply, self._deadline)
            finally:
                del reply
        if not isinstance(reply, Done):
            raise self._link.unexpected(reply)
        return data or b""

    def close(self) -> None:
        """Want no answer any more. Idempotent."""
        self._link.forget(self._number)


class LinkRelay:
    """Relayed reads and writes as requests on a link; a ``Relay`` of the transports."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @property
    def same_process_peer(self) -> SameProcessPeer | None:
        """The peer, where it is in this process."""
        return self._link.same_process_peer

    @property
    def process(self) -> PeerProcess | None:
        """The peer's process, as the kernel knows it, where it is on this host."""
        return self._link.connection.process

    def descriptor(self, region: RegionView) -> int:
        """Have the peer send a descriptor of one of its regions."""
        return self._link.ask_for_region(region.region_id)

    def read(self, movement: Movement, spans: torch.Tensor, deadline: Deadline) -> Request:
        """Ask the owner for the bytes of ``spans``."""
        wanted = ReadBytes(movement.lease_id, spans.numpy().tobytes(), _claim_of(movement))
        return self._link.begin(wanted, deadline)

    def write(
        self, movement: Movement, spans: torch.Tensor, data: memoryview, deadline: Deadline
    ) -> Request:
        """Have the owner write ``data`` over ``spans``."""
        wanted = WriteBytes(movement.lease_id, spans.numpy().tobytes())
        return self._link.begin(wanted, deadline, data)

    def call(self, movement: Movement, transport: str, payload: bytes, deadline: Deadline) -> bytes:
        """Ask the peer's channel of a transport."""
        call = Call(movement.lease_id, transport, payload, _claim_of(movement))
        reply, _ = self._link.request(call, deadline)
        if not isinstance(reply, Called):
            raise self._link.unexpected(reply)
        return reply.payload

    def post(self, transport: str, payload: bytes) -> None:
        """Tell the peer's channel of a transport."""
        self._link.post(Note(transport, payload))


def _claim_of(movement: Movement) -> Claim | None:
    return movement.claim if isinstance(movement.claim, Claim) else None
