# SPDX-License-Identifier: Apache-2.0
"""How two instances agree on a link, also when both ask at once (reference API, 11.1)."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from llm_datadist_torch.links.link import SHARE_IT, Link, Pending
from llm_datadist_torch.links.registry import LinkRegistry
from llm_datadist_torch.net.connection import Connection
from llm_datadist_torch.net.endpoint import Endpoint
from llm_datadist_torch.serving.messages import (
    ANY_PEER,
    Body,
    Envelope,
    Hello,
    Join,
    Refused,
    Welcome,
    encode,
)
from llm_datadist_torch.serving.peer import LinkState
from llm_datadist_torch.serving.same_process import LinkEnd
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, code_2_status, error_for

logger = logging.getLogger("llm_datadist_torch")

_MOMENT_MS = 1000
_RETRY_S = 0.002
_ALREADY = LLMStatusCode.LLM_ALREADY_LINK


@dataclass(eq=False)
class Dial:
    """A link that this side is requesting.

    Attributes:
        peer: Cluster id that is dialed.
        connection: The connection that is used.
        owner: What the link is for.
        said: Whether our ``Hello`` is on its way. Before that, nobody can answer it, and the dial
            can be given up without a trace.
        answer: The result, set once.
        name: Random name of the future link.
        address: The host and port there.
        replaces: The lost link that is to be relinked, if it is for that.
        link_end: Our end of the link, for a peer in this process to find.
    """

    peer: int
    connection: Connection
    owner: str
    said: bool = False
    answer: Pending = field(default_factory=Pending)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    address: tuple[str, int] | None = None
    replaces: Link | None = None
    link_end: LinkEnd | None = None


@dataclass(frozen=True)
class Identity:
    """What an instance says of itself.

    Attributes:
        cluster_id: Its id.
        epoch: Random name of its life from init to finalize.
        remote_accessible: Both ends of a link must have the same value.
    """

    cluster_id: int
    epoch: str
    remote_accessible: bool


class Handshake:
    """Asks for links, and answers peers that ask.

    When two instances dial each other at once, one link must come of it, whatever happens to
    either dial. The ``Hello`` of a dial is sent when its connection is up, by the endpoint's
    thread, which also handles the peer's ``Hello``: so it always knows what the peer may have
    heard. A dial that has said nothing makes way for the peer's. Of two that have both spoken, the
    one of the smaller id makes the link.

    Thread safety: ``start``, ``finish``, ``share`` and ``cancel`` may be called from any thread;
    ``on_*`` come from the endpoint's thread.
    """

    def __init__(self, identity: Identity, registry: LinkRegistry, endpoint: Endpoint) -> None:
        self._identity = identity
        self._registry = registry
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._dials: dict[Connection, Dial] = {}

    # -- asking -----------------------------------------------------------------------------------

    def start(self, peer: int, host: str, port: int, owner: str) -> Dial | Link | LLMStatusCode:
        """Start to ask for a link. Does not block.

        Returns:
            The dial, for :meth:`finish`; the link that is there, for :meth:`share`; or a status.
        """
        link = self._registry.linked(peer)
        if link is not None:
            if owner not in link.owners:
                return link
            logger.warning("cluster %d is linked already", peer)
            return _ALREADY
        return self._dial(Dial(peer, self._endpoint.new_connection(), owner, address=(host, port)))

    def link_again(self, lost: Link, deadline: Deadline) -> LLMStatusCode:
        """Relink a lost link for all its owners; the peer at its address may be a new process."""
        owners = sorted(lost.owners)
        if lost.address is None or not owners:
            return LLMStatusCode.LLM_NOT_YET_LINK
        connection = self._endpoint.new_connection()
        dial = Dial(lost.peer, connection, owners[0], address=lost.address, replaces=lost)
        status = self.finish(self._dial(dial), deadline)
        link = self._registry.linked(lost.peer)
        if link is not None:
            for owner in owners:
                if owner not in link.owners:
                    self.share(link, owner, deadline)
        return status

    def _dial(self, dial: Dial) -> Dial:
        dial.link_end = self._registry.announce(dial.name)
        with self._lock:
            self._dials[dial.connection] = dial
        if dial.address is not None:
            self._endpoint.connect(dial.connection, *dial.address)
        return dial

    def finish(self, dial: Dial, deadline: Deadline) -> LLMStatusCode:
        """Wait for what comes of a dial, at most until the deadline."""
        answered = dial.answer.wait(deadline)
        with self._lock:
            claimed = self._dials.pop(dial.connection, None) is None
        if answered is None and claimed:
            # The welcome arrived in the last moment, and the link is being made right now.
            answered = dial.answer.wait(Deadline.after_ms(_MOMENT_MS))
        answer = None if answered is None else answered[0]
        if isinstance(answer, Welcome):
            return LLMStatusCode.LLM_SUCCESS
        self._endpoint.drop(dial.connection)
        if answer is None:
            logger.warning("cluster %d did not answer within %d ms", dial.peer, deadline.budget_ms)
            return LLMStatusCode.LLM_TIMEOUT
        status = _status_of(answer)
        if status == _ALREADY:
            return self._take_the_peers(dial, deadline)
        logger.warning("linking cluster %d failed: %s", dial.peer, _text_of(answer))
        return status

    def _take_the_peers(self, dial: Dial, deadline: Deadline) -> LLMStatusCode:
        """The peer's own dial makes the link; its ``Hello`` may still be on its way."""
        moment = Deadline.after_ms(min(_MOMENT_MS, int(deadline.remaining_s() * 1000)))
        while (link := self._registry.linked(dial.peer)) is None and not moment.expired:
            time.sleep(_RETRY_S)
        if link is None or (dial.owner in link.owners and link.dialed):
            logger.warning("cluster %d is linked already", dial.peer)
            return _ALREADY
        if dial.owner in link.owners:
            return LLMStatusCode.LLM_SUCCESS
        return self.share(link, dial.owner, deadline)

    def identify(self, host: str, port: int, deadline: Deadline) -> int:
        """Ask which cluster answers at an address, without linking to it.

        The peer checks the protocol, the secret and the mode as it does for a link.

        Raises:
            LLMTimeoutError: No answer in time.
            LLMLinkError: Connection refused or unreachable, or another ``link_secret``.
            LLMException: The peer refused, with its status and text.
        """
        dial = self._dial(Dial(ANY_PEER, self._endpoint.new_connection(), "", address=(host, port)))
        try:
            answered = dial.answer.wait(deadline)
        finally:
            with self._lock:
                self._dials.pop(dial.connection, None)
            self._endpoint.drop(dial.connection)
        answer = None if answered is None else answered[0]
        if isinstance(answer, Welcome):
            return answer.cluster_id
        if answer is None:
            raise error_for(
                LLMStatusCode.LLM_TIMEOUT,
                f"{host} port {port} did not answer within {deadline.budget_ms} ms",
                op="identify",
            )
        if isinstance(answer, LLMException):
            raise answer
        raise error_for(_status_of(answer), f"{host} port {port}: {_text_of(answer)}")

    def share(self, link: Link, owner: str, deadline: Deadline) -> LLMStatusCode:
        """Keep a link that is there for one more purpose, on both sides."""
        try:
            link.request(Join(owner), deadline)
            self._registry.acquire(link, owner)
        except LLMException as error:
            logger.warning("sharing the link to cluster %d failed: %s", link.peer, error)
            return error.status_code
        return LLMStatusCode.LLM_SUCCESS

    def cancel(self, reason: str, owner: str | None = None) -> None:
        """End the dials that are for this, or all, with LLM_LINK_FAILED."""
        with self._lock:
            dials = [dial for dial in self._dials.values() if owner in (None, dial.owner)]
        for dial in dials:
            dial.answer.set(error_for(LLMStatusCode.LLM_LINK_FAILED, reason, peer=dial.peer))

    # -- what comes of a dial ---------------------------------------------------------------------

    def on_connected(self, connection: Connection) -> None:
        """The connection of a dial is up: introduce ourselves."""
        with self._lock:
            dial = self._dials.get(connection)
        if dial is None:
            return
        dial.said = True
        me = self._identity
        hello = Hello(
            me.cluster_id,
            dial.peer,
            me.epoch,
            me.remote_accessible,
            self._registry.offers(),
            dial.owner,
            dial.name,
            "" if dial.replaces is None else dial.replaces.name,
            self._registry.earlier.of(dial.peer),
        )
        connection.send(encode(Envelope(1, False, hello)))

    def on_answer(self, connection: Connection, body: Body) -> None:
        """The peer has answered a dial."""
        with self._lock:
            dial = self._dials.pop(connection, None)
        if dial is None:
            return
        try:
            if isinstance(body, Welcome) and dial.peer != ANY_PEER:
                if body.cluster_id != dial.peer:
                    raise param_error(f"cluster {body.cluster_id} answers there")
                self._registry.end_unused_leases(body.epoch, body.earlier)
                self._registry.make(
                    body.cluster_id,
                    body.epoch,
                    connection,
                    body.offers,
                    dialed=True,
                    owner=dial.owner,
                    name=dial.name,
                    address=dial.address,
                    replaces=dial.replaces,
                    link_end=dial.link_end,
                )
        except (LLMException, msgspec.DecodeError) as error:
            text = str(error)
            dial.answer.set(error_for(LLMStatusCode.LLM_LINK_FAILED, text, peer=dial.peer))
        else:
            dial.answer.set(body)

    def on_lost(self, connection: Connection, reason: str) -> None:
        """The connection of a dial has ended, or never came about."""
        dial = self._dials.get(connection)
        if dial is not None:
            remedy = SHARE_IT if "link_secret" in reason else None
            status = LLMStatusCode.LLM_LINK_FAILED
            dial.answer.set(error_for(status, reason, peer=dial.peer, remedy=remedy))

    # -- being asked ------------------------------------------------------------------------------

    def on_hello(
        self, connection: Connection, hello: Hello, welcome: Callable[[Welcome], None]
    ) -> None:
        """A peer asks for a link, or who answers.

        Args:
            connection: Where.
            hello: What it says.
            welcome: Sends the answer, before anything else can be said on the link.

        Raises:
            LLMException: Why it can't have one.
        """
        me = self._identity
        if hello.expected_id not in (me.cluster_id, ANY_PEER):
            raise param_error(
                f"cluster {hello.expected_id} was asked for, this is cluster {me.cluster_id}"
            )
        if hello.remote_accessible != me.remote_accessible:
            raise param_error(
                f"enable_remote_cache_accessible is {hello.remote_accessible} there and"
                f" {me.remote_accessible} here"
            )
        # A link to ourselves needs only the asking half.
        if hello.epoch == me.epoch or hello.expected_id == ANY_PEER:
            welcome(Welcome(me.cluster_id, me.epoch, self._registry.offers()))
            return
        self._check_free(hello)
        self._registry.end_unused_leases(hello.epoch, hello.earlier)
        earlier = self._registry.earlier.of(hello.cluster_id)
        answer = Welcome(me.cluster_id, me.epoch, self._registry.offers(), earlier)
        self._make(connection, hello, lambda: welcome(answer))
        self._endpoint.keep(connection)
        self._make_way(hello.cluster_id)

    def _make(self, connection: Connection, hello: Hello, confirm: Callable[[], None]) -> None:
        try:
            self._registry.make(
                hello.cluster_id,
                hello.epoch,
                connection,
                hello.offers,
                dialed=False,
                owner=hello.owner,
                name=hello.name,
                confirm=confirm,
            )
        except (msgspec.DecodeError, UnicodeError) as error:
            text = f"what a transport offers is no offer: {error}"
            raise error_for(LLMStatusCode.LLM_LINK_FAILED, text) from None

    def _check_free(self, hello: Hello) -> None:
        """Refuse a second link to one peer.

        A link to an earlier life of the peer is stale and makes room.
        """
        peer = hello.cluster_id
        old = self._registry.linked(peer)
        if old is not None:
            if old.epoch == hello.epoch:
                if not hello.lost or hello.lost != old.name:
                    raise error_for(_ALREADY, f"cluster {peer} is linked already")
                # It is the same process, and what it does by its leases may still go on.
                reason = "the peer had lost it, and links again"
                self._registry.end_but_keep_leases(old, LinkState.LOST, reason)
            else:
                logger.warning("cluster %d came back as a new process: its old link ends", peer)
                reason = "the peer came back as a new process"
                self._registry.end_but_keep_leases(old, LinkState.LOST, reason)
        with self._lock:
            said = any(dial.peer == peer and dial.said for dial in self._dials.values())
        if said and self._identity.cluster_id < peer:
            raise error_for(
                _ALREADY, f"cluster {self._identity.cluster_id} is linking to you already"
            )

    def _make_way(self, peer: int) -> None:
        """The peer's dial has made the link: ours that have said nothing end."""
        with self._lock:
            silent = [d for d in self._dials.values() if d.peer == peer and not d.said]
            for dial in silent:
                del self._dials[dial.connection]
        for dial in silent:
            dial.answer.set(error_for(_ALREADY, f"cluster {peer} has linked to us meanwhile"))


def _status_of(answer: Body | LLMException) -> LLMStatusCode:
    if isinstance(answer, LLMException):
        return answer.status_code
    if isinstance(answer, Refused):
        return code_2_status(answer.status)
    return LLMStatusCode.LLM_FAILED


def _text_of(answer: Body | LLMException) -> str:
    return answer.text if isinstance(answer, Refused) else str(answer)
