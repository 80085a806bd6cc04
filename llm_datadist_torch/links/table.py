# SPDX-License-Identifier: Apache-2.0
"""All links of one instance: how they are made, lost and ended (reference API, 11.1 and 11.2)."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from llm_datadist_torch.links.handshake import Dial, Handshake, Identity
from llm_datadist_torch.links.link import Link
from llm_datadist_torch.links.meetings import Meetings
from llm_datadist_torch.links.questions import Questions
from llm_datadist_torch.links.registry import CLUSTERS, LinkRegistry
from llm_datadist_torch.links.relink import Relinker
from llm_datadist_torch.net.connection import Connection, Data
from llm_datadist_torch.net.endpoint import Endpoint
from llm_datadist_torch.net.tls import LinkKeys
from llm_datadist_torch.serving.messages import (
    Body,
    CacheView,
    Call,
    Done,
    EnterMeeting,
    Envelope,
    Hello,
    Join,
    JoinMeeting,
    Question,
    Refused,
    RegionFreed,
    Release,
    ShareRegion,
    Unlink,
    decode,
    encode,
    refused,
)
from llm_datadist_torch.serving.owner import Owner
from llm_datadist_torch.serving.peer import Grant, LinkState
from llm_datadist_torch.transports.choice import TransportSet
from llm_datadist_torch.values.config import EngineConfig
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for
from llm_datadist_torch.values.version import VERSION

logger = logging.getLogger("llm_datadist_torch")

_BUSY_RETRY_S = 0.01


class LinkTable:
    """Makes, finds and ends links.

    The :class:`~llm_datadist_torch.net.endpoint.Handler` of the endpoint.

    Leases: a peer that uses one of our caches holds a lease, which keeps its memory in place. When
    we end the link, we first give no more leases, and wait for those there are, at most until the
    deadline. A peer that then still has one is not waited for any longer; what it uses is freed
    when it says that it has finished, or when its connection ends. The leases of a peer that dies,
    or that ends the link itself, end with the link. One that only fell silent may wake up and go
    on: its leases end when it gives them back, or with the connection.

    Thread safety: public methods may be called from any thread; ``on_*`` come from the endpoint's
    thread.

    Args:
        cluster_id: This instance's id.
        owner: Answers peers about our caches.
        transports: What can move bytes.
        config: How links are kept: ``remote_accessible`` (both ends of a link must have the same),
            ``auto_relink``.

    Raises:
        LLMException: LLM_FAILED: no descriptors or sockets are left. Nothing is held.
    """

    def __init__(
        self,
        cluster_id: int,
        owner: Owner,
        transports: TransportSet,
        config: EngineConfig,
    ) -> None:
        self.identity = Identity(cluster_id, uuid.uuid4().hex, config.remote_accessible)
        self._owner = owner
        self.questions = Questions()
        self.keys = LinkKeys.from_secret(config.link_secret)
        try:
            self.endpoint = Endpoint(self, VERSION, self.keys)
        except OSError as error:
            text = f"there are no sockets to be had: {error}"
            raise error_for(LLMStatusCode.LLM_FAILED, text, op="init") from error
        with ExitStack() as undo:
            undo.callback(self.endpoint.close)
            self.late: list[Grant] = []
            self.registry = LinkRegistry(self.identity.epoch, owner, transports, self.endpoint)
            self._handshake = Handshake(self.identity, self.registry, self.endpoint)
            self.meetings = Meetings(self.endpoint)
            self._relinker = Relinker(self.registry, self._handshake, enabled=config.auto_relink)
            undo.pop_all()

    # -- for the instance -------------------------------------------------------------------------

    def find(self, peer: int) -> Link:
        """See :meth:`Relinker.find`."""
        return self._relinker.find(peer)

    def use(self, peer: int, deadline: Deadline) -> Link:
        """See :meth:`Relinker.use`."""
        link = self.registry.by_peer.get(peer)
        if link is not None and link.state is LinkState.LINKED:
            return link
        return self._relinker.use(peer, deadline)

    def identify(self, host: str, port: int, deadline: Deadline) -> int:
        """See :meth:`Handshake.identify`."""
        return self._handshake.identify(host, port, deadline)

    def links(self) -> list[Link]:
        """All links, lost ones too."""
        return self.registry.all()

    def link_all(
        self,
        targets: Sequence[tuple[int, str, int] | LLMStatusCode],
        deadline: Deadline,
        owner: str = CLUSTERS,
    ) -> list[LLMStatusCode]:
        """Link to all targets at once; blocks until each has answered, at most until the deadline.

        Args:
            targets: (peer, host, port) each; a status instead means that the target was refused
                before.
            deadline: One for all of them.
            owner: What the links are for. A link that is there for something else is shared.

        Returns:
            One status per target.
        """
        started = [
            target if isinstance(target, LLMStatusCode) else self._handshake.start(*target, owner)
            for target in targets
        ]
        return [self._finish(each, owner, deadline) for each in started]

    def _finish(
        self, started: Dial | Link | LLMStatusCode, owner: str, deadline: Deadline
    ) -> LLMStatusCode:
        if isinstance(started, Dial):
            return self._handshake.finish(started, deadline)
        if isinstance(started, Link):
            return self._handshake.share(started, owner, deadline)
        return started

    def cancel_dials(self, owner: str) -> None:
        """Links that are being asked for this are not wanted any more."""
        self._handshake.cancel("the communicator has been unlinked", owner)

    def unlink(self, peer: int, deadline: Deadline) -> None:
        """End a link in agreement with the peer, after running transfers of both sides.

        Without a link nothing happens; one that a communicator keeps stays.

        Raises:
            LLMTimeoutError: Transfers, or the peer's answer, took too long; the link is kept.
            LLMPeerLostError: The peer is gone; the link is kept, as lost.
        """
        link = self.registry.get(peer)
        if link is None or not self.registry.release(link, CLUSTERS):
            return
        ticket = threading.Lock()
        with ticket:
            link.stop_transfers(ticket, deadline)
            link.unlinking = True
            try:
                if link.epoch != self.identity.epoch:
                    self._agree_to_unlink(link, deadline)
            except LLMException:
                if link.ended_by:
                    self.registry.end(link, LinkState.LOST, link.ended_by)
                raise
            finally:
                link.unlinking = False
            self.registry.end(link, LinkState.UNLINKED, "unlink_clusters")

    def _agree_to_unlink(self, link: Link, deadline: Deadline) -> None:
        while True:
            try:
                link.request(Unlink(), deadline)
            except LLMException as error:
                if link.state is LinkState.UNLINKED:
                    # The peer unlinked at the same time.
                    return
                # Busy: the peer has a transfer of its own under way on this link.
                if error.status_code != LLMStatusCode.LLM_LINK_BUSY or deadline.expired:
                    raise
                time.sleep(_BUSY_RETRY_S)
            else:
                return

    def unlink_here(self, peer: int, deadline: Deadline, owner: str = CLUSTERS) -> None:
        """End a link on this side only, after running transfers of both sides.

        One that something else keeps stays. See the class for what a peer's transfers may delay.

        Raises:
            LLMTimeoutError: Our own transfers took too long; the link is kept.
        """
        link = self.registry.get(peer)
        if link is None or not self.registry.release(link, owner):
            return
        ticket = threading.Lock()
        with ticket:
            link.stop_transfers(ticket, deadline)
            if link.state is not LinkState.LINKED:
                self.registry.end(link, LinkState.UNLINKED, "unlinked")
                linked_again = self.registry.linked(peer) is not None
            else:
                linked_again = False
                self._leave(link, deadline)
        if linked_again:
            self.unlink_here(peer, deadline, owner)

    def _leave(self, link: Link, deadline: Deadline) -> None:
        link.leaving = True
        finished = link.wait_for_leases(deadline)
        # The peer's transfers must not succeed from now on. No answer needed.
        link.post(Unlink())
        if finished:
            self.registry.end(link, LinkState.UNLINKED, "unlinked on this side")
        else:
            logger.warning(
                "cluster %d still uses %d cache(s) after %d ms: the link ends, but they are"
                " not freed before it has finished or ended",
                link.peer,
                len(link.grants),
                deadline.budget_ms,
            )
            self.registry.end_but_keep_leases(link, LinkState.UNLINKED, "unlinked on this side")

    def region_freed(self, region_id: int) -> None:
        """Tell the peers that may have mapped a region to unmap it."""
        for link in self.links():
            if link.state is LinkState.LINKED and region_id in link.shown_regions:
                link.shown_regions.pop(region_id, None)
                link.post(RegionFreed(region_id))

    def close(self, deadline: Deadline) -> None:
        """End all links, telling the peers, and close the sockets. Idempotent.

        Waits for running transfers of both sides, at most until the deadline. Peers that may still
        write then, because their processes live, are in ``late``.
        """
        self._handshake.cancel("the instance has been finalized")
        self.questions.close()
        linked = [link for link in self.links() if link.state is LinkState.LINKED]
        for link in linked:
            link.leaving = True
        for link in linked:
            # What is still under way then is cut off.
            ticket = threading.Lock()
            with ticket, suppress(LLMException):
                link.stop_transfers(ticket, deadline)
                link.wait_for_leases(deadline)
            link.post(Unlink())
        # Before the connections are closed, and noted if this is interrupted and called again.
        late = self.registry.quarantined
        for link in self.links():
            process = link.connection.process
            if process is not None and not process.is_this_one and process.alive:
                late += [grant for grant in list(link.grants.values()) if grant.write]
        self.late = late or self.late
        self.endpoint.close()
        for link in self.links():
            self.registry.end(link, LinkState.UNLINKED, "finalize")
        self.registry.drain_all()
        self.registry.late_writers.close()
        self.registry.events.close()

    # -- the endpoint's handler -------------------------------------------------------------------

    def on_connected(self, connection: Connection) -> None:
        """See :class:`~llm_datadist_torch.net.endpoint.Handler`."""
        if not self.meetings.on_connected(connection):
            self._handshake.on_connected(connection)

    def on_message(self, connection: Connection, message: memoryview, data: Data | None) -> None:
        """See :class:`~llm_datadist_torch.net.endpoint.Handler`."""
        envelope = decode(message)
        link = self.registry.at(connection)
        if envelope.reply:
            if link is not None:
                link.on_reply(envelope.request_id, envelope.body, data)
            elif isinstance(envelope.body, CacheView):
                # Requested on a link that has ended: nothing else would return this lease.
                connection.send(encode(Envelope(0, False, Release(envelope.body.lease_id, None))))
            elif not self.meetings.on_answer(connection, envelope.body):
                self._handshake.on_answer(connection, envelope.body)
        else:
            self._serve(link, connection, envelope, data)

    def _serve(
        self, link: Link | None, connection: Connection, envelope: Envelope, data: Data | None
    ) -> None:
        try:
            if self._answers_later(link, connection, envelope):
                return
            asked = envelope.request_id != 0
            answer = self._answer(link, connection, envelope.body, data, asked=asked)
        except LLMException as error:
            answer = refused(error), None
        except Exception as error:
            logger.exception("answering %s failed", type(envelope.body).__name__)
            answer = refused(error), None
        if answer is not None and envelope.request_id:
            connection.send(encode(Envelope(envelope.request_id, True, answer[0])), answer[1])
        if isinstance(envelope.body, Unlink) and not isinstance(answer and answer[0], Refused):
            if link is None:
                self.endpoint.drop(connection)
            elif not self.registry.is_draining(connection):
                link.hang_up()
            elif not connection.dialed:
                # The peer has a while to give its leases back, and to close it.
                self.endpoint.drop(connection)

    def _answers_later(self, link: Link | None, connection: Connection, envelope: Envelope) -> bool:
        """Whether it is a request that is not answered at once; then it has been taken."""
        body, reply = envelope.body, self._replier(connection, envelope.request_id)
        if isinstance(body, EnterMeeting):
            self.meetings.on_enter(connection, body, reply)
        elif isinstance(body, Hello):
            self._check_is_stranger(link, connection)
            self._handshake.on_hello(connection, body, reply)
        elif link is None:
            return False
        elif isinstance(body, Call):
            self._owner.serve(link, body, reply)
        elif isinstance(body, Question):
            self.questions.put(link.peer, body.payload, reply)
        elif isinstance(body, ShareRegion) and link is not None:
            descriptor = self._owner.share_region(link, body.region_id)
            answer = encode(Envelope(envelope.request_id, True, Done()))
            connection.send(answer, None, (descriptor,))
        else:
            return False
        return True

    def _replier(self, connection: Connection, request_id: int) -> Callable[[Body], None]:
        def reply(body: Body) -> None:
            if request_id:
                connection.send(encode(Envelope(request_id, True, body)))

        return reply

    def _answer(
        self,
        link: Link | None,
        connection: Connection,
        body: Body,
        data: Data | None,
        *,
        asked: bool,
    ) -> tuple[Body, memoryview | None] | None:
        if isinstance(body, JoinMeeting):
            self._check_is_stranger(link, connection)
            return self.meetings.on_join(connection, body), None
        if link is None:
            if isinstance(body, Release) and self.registry.give_back(connection, body):
                return None
            if not isinstance(body, Unlink):
                # We ended this link alone (force): tell the other side that it has ended.
                connection.send(encode(Envelope(0, False, Unlink())))
            raise error_for(
                LLMStatusCode.LLM_NOT_YET_LINK,
                f"cluster {self.identity.cluster_id} has no such link",
            )
        if isinstance(body, Unlink):
            return self._on_unlink(link, asked=asked), None
        if isinstance(body, Join):
            self.registry.acquire(link, body.owner)
            return Done(), None
        if isinstance(body, Release) and body.link:
            self.registry.late_writers.release(link.epoch, body.link, body.lease_id)
            return None
        answer = self._owner.answer(link, body, data)
        if answer is not None and isinstance(answer[0], CacheView) and link.leaving:
            # The thread that ends the link may have missed this lease.
            self._owner.release(link, Release(answer[0].lease_id, None))
            raise error_for(
                LLMStatusCode.LLM_NOT_YET_LINK,
                f"cluster {self.identity.cluster_id} is ending the link",
            )
        return answer

    def _check_is_stranger(self, link: Link | None, connection: Connection) -> None:
        if link is not None or self.meetings.has_joined(connection):
            text = "this connection is a link, or takes part in a meeting, already"
            raise error_for(LLMStatusCode.LLM_ALREADY_LINK, text)

    def _on_unlink(self, link: Link, *, asked: bool) -> Body:
        if link.unlinking or not asked:
            # Told, not asked: its leases have ended already, so a transfer of ours must not
            # succeed. One of the peer's that it has cut off may still write.
            reason = f"cluster {link.peer} ended it"
            if any(grant.write for grant in list(link.grants.values())):
                self.registry.end_but_keep_leases(link, LinkState.UNLINKED, reason)
            else:
                self.registry.end(link, LinkState.UNLINKED, reason, keep_connection=True)
            return Done()
        ticket = threading.Lock()
        with ticket:
            if not link.transfers.try_stop(ticket):
                raise error_for(
                    LLMStatusCode.LLM_LINK_BUSY,
                    f"cluster {self.identity.cluster_id} is moving bytes on the link",
                )
            self.registry.end(
                link, LinkState.UNLINKED, f"cluster {link.peer} unlinked", keep_connection=True
            )
        return Done()

    def on_lost(self, connection: Connection, reason: str) -> None:
        """See :class:`~llm_datadist_torch.net.endpoint.Handler`."""
        self._handshake.on_lost(connection, reason)
        self.meetings.on_lost(connection, reason)
        self.registry.gone(connection)
        link = self.registry.at(connection)
        if link is not None:
            self.registry.late_writers.retain(link)
        if link is not None and link.leaving:
            # The peer has heard that we are ending it, and has closed its side.
            self.registry.end(link, LinkState.UNLINKED, "unlinked on this side")
        elif link is not None and link.unlinking:
            # If the peer has agreed before it closed the connection, this is not a loss. The thread
            # that unlinks knows.
            link.connection_ended(reason)
        elif link is not None:
            logger.warning("link to cluster %d lost: %s", link.peer, reason)
            self.registry.end(link, LinkState.LOST, reason)
