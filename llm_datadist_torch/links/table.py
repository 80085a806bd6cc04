# SPDX-License-Identifier: Apache-2.0
"""All links of one instance: how they are made, lost and ended (reference API, 11.1 and 11.2)."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Sequence

import msgspec

from llm_datadist_torch.deadline import Deadline
from llm_datadist_torch.links.endpoint import Endpoint, Route
from llm_datadist_torch.links.link import Dial, Link, LinkRelay, LinkState
from llm_datadist_torch.links.messages import (
    PROTOCOL_VERSION,
    Body,
    Done,
    Envelope,
    Hello,
    Refused,
    RegionFreed,
    Unlink,
    Welcome,
)
from llm_datadist_torch.links.owner import Owner
from llm_datadist_torch.transports.base import Transport
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import (
    LLMException,
    LLMStatusCode,
    code_2_status,
    error_for,
)

logger = logging.getLogger("llm_datadist_torch")

_BUSY_RETRY_S = 0.01
_MOMENT_MS = 1000


class LinkTable:
    """Makes, finds and ends links.

    The :class:`~llm_datadist_torch.links.endpoint.Handler` of the endpoint.

    Thread safety: public methods may be called from any thread; ``on_message`` and ``on_lost`` come
    from the endpoint's thread.

    Args:
        cluster_id: This instance's id.
        owner: Answers peers about our caches.
        transports: What can move bytes, by name.
        remote_accessible: Both ends of a link must have the same value.
    """

    def __init__(
        self,
        cluster_id: int,
        owner: Owner,
        transports: dict[str, Transport],
        *,
        remote_accessible: bool,
    ) -> None:
        self._cluster_id = cluster_id
        self._owner = owner
        self._transports = transports
        self._remote_accessible = remote_accessible
        self._epoch = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._links: dict[int, Link] = {}
        self._by_route: dict[Route, Link] = {}
        self._dials: dict[Route, Dial] = {}
        self.endpoint = Endpoint(self)

    # -- for the instance -------------------------------------------------------------------------

    def find(self, peer: int) -> Link:
        """The link to ``peer``.

        Raises:
            LLMNotLinkedError: There is none, or it was lost.
        """
        link = self._links.get(peer)
        if link is None:
            raise error_for(
                LLMStatusCode.LLM_NOT_YET_LINK, f"cluster {peer} is not linked", peer=peer
            )
        link.check_linked()
        return link

    def links(self) -> list[Link]:
        """All links, lost ones too."""
        with self._lock:
            return list(self._links.values())

    def link_all(
        self, targets: Sequence[tuple[int, str, int] | LLMStatusCode], deadline: Deadline
    ) -> list[LLMStatusCode]:
        """Link to all targets at once; blocks until each has answered, at most until the deadline.

        Args:
            targets: (peer, host, port) each; a status instead means that the target was refused
                before.
            deadline: One for all of them.

        Returns:
            One status per target.
        """
        started: list[Dial | LLMStatusCode] = [
            target if isinstance(target, LLMStatusCode) else self._dial(*target)
            for target in targets
        ]
        return [
            dial if isinstance(dial, LLMStatusCode) else self._await(dial, deadline)
            for dial in started
        ]

    def unlink(self, peer: int, deadline: Deadline) -> None:
        """End a link in agreement with the peer, after running transfers.

        Without a link nothing happens.

        Raises:
            LLMTimeoutError: Transfers, or the peer's answer, took too long; the link is kept.
            LLMPeerLostError: The peer is gone; the link is kept, as lost.
        """
        link = self._links.get(peer)
        if link is None:
            return
        with link.transfer(deadline):
            link.unlinking = True
            try:
                if link.epoch != self._epoch:
                    self._agree_to_unlink(link, deadline)
            finally:
                link.unlinking = False
            self._end(link, LinkState.UNLINKED, "unlink_clusters")

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

    def unlink_here(self, peer: int, deadline: Deadline) -> None:
        """End a link on this side only, after running transfers.

        Raises:
            LLMTimeoutError: Transfers took too long; the link is kept.
        """
        link = self._links.get(peer)
        if link is None:
            return
        with link.transfer(deadline):
            if link.state is LinkState.LINKED:
                # Its leases end here and now, so its transfers must not succeed. No answer needed.
                link.post(Unlink())
            self._end(link, LinkState.UNLINKED, "unlink_clusters(force=True)")

    def region_freed(self, region_id: int) -> None:
        """Tell the peers that may have mapped a region to let go of it."""
        for link in self.links():
            if link.state is LinkState.LINKED and region_id in link.shown_regions:
                link.shown_regions.discard(region_id)
                link.post(RegionFreed(region_id))

    def close(self) -> None:
        """End all links, telling the peers, and close the sockets. Idempotent."""
        for link in self.links():
            if link.state is LinkState.LINKED:
                link.post(Unlink())
        self.endpoint.close()
        for link in self.links():
            self._end(link, LinkState.UNLINKED, "finalize")

    # -- asking for a link ------------------------------------------------------------------------

    def _dial(self, peer: int, host: str, port: int) -> Dial | LLMStatusCode:
        link = self._links.get(peer)
        if link is not None and link.state is LinkState.LINKED:
            logger.warning("cluster %d is linked already", peer)
            return LLMStatusCode.LLM_ALREADY_LINK
        route = self.endpoint.new_route()
        dial = Dial(peer, route)
        with self._lock:
            self._dials[route] = dial
        self.endpoint.connect(route, host, port)
        hello = Hello(
            PROTOCOL_VERSION,
            self._cluster_id,
            peer,
            self._epoch,
            self._remote_accessible,
            {name: transport.offer() for name, transport in self._transports.items()},
        )
        self.endpoint.send(route, Envelope(1, False, hello))
        return dial

    def _await(self, dial: Dial, deadline: Deadline) -> LLMStatusCode:
        answered = dial.answer.wait(deadline)
        with self._lock:
            claimed = self._dials.pop(dial.route, None) is None
        if answered is None and claimed:
            # The welcome arrived in the last moment, and the link is being made right now.
            answered = dial.answer.wait(Deadline.after_ms(_MOMENT_MS))
        if answered is not None and isinstance(answered[0], Welcome):
            return LLMStatusCode.LLM_SUCCESS
        self.endpoint.drop(dial.route)
        if answered is None:
            logger.warning("cluster %d did not answer within %d ms", dial.peer, deadline.budget_ms)
            return LLMStatusCode.LLM_TIMEOUT
        refusal = answered[0]
        if isinstance(refusal, LLMException):
            logger.warning("linking cluster %d failed: %s", dial.peer, refusal)
            return refusal.status_code
        if isinstance(refusal, Refused):
            logger.warning("cluster %d refused the link: %s", dial.peer, refusal.text)
            return code_2_status(refusal.status)
        return LLMStatusCode.LLM_FAILED

    def _on_dial_answer(self, dial: Dial, body: Body) -> None:
        with self._lock:
            if self._dials.pop(dial.route, None) is None:
                return
        try:
            if isinstance(body, Welcome):
                self._make(body.cluster_id, body.epoch, dial.route, body.offers, dialed=True)
        except (LLMException, msgspec.DecodeError) as error:
            text = str(error)
            dial.answer.set(error_for(LLMStatusCode.LLM_LINK_FAILED, text, peer=dial.peer))
        else:
            dial.answer.set(body)

    # -- being asked for a link -------------------------------------------------------------------

    def _on_hello(self, route: Route, hello: Hello) -> Welcome:
        if hello.version != PROTOCOL_VERSION:
            raise error_for(
                LLMStatusCode.LLM_FAILED,
                f"protocol version {hello.version}, this side has {PROTOCOL_VERSION}",
            )
        if hello.expected_id != self._cluster_id:
            raise param_error(
                f"cluster {hello.expected_id} was asked for, this is cluster {self._cluster_id}"
            )
        if hello.remote_accessible != self._remote_accessible:
            raise param_error(
                f"enable_remote_cache_accessible is {hello.remote_accessible} there and"
                f" {self._remote_accessible} here"
            )
        # A link to ourselves needs only the asking half.
        if hello.epoch != self._epoch:
            self._check_free(hello)
            self._make(hello.cluster_id, hello.epoch, route, hello.offers, dialed=False)
            self.endpoint.watch(route)
        offers = {name: transport.offer() for name, transport in self._transports.items()}
        return Welcome(self._cluster_id, self._epoch, offers)

    def _check_free(self, hello: Hello) -> None:
        """Refuse a second link to one peer.

        A link to an earlier life of the peer is stale and makes room.
        """
        with self._lock:
            old = self._links.get(hello.cluster_id)
            asking = any(dial.peer == hello.cluster_id for dial in self._dials.values())
        if old is not None and old.state is LinkState.LINKED:
            if old.epoch == hello.epoch:
                raise error_for(
                    LLMStatusCode.LLM_ALREADY_LINK, f"cluster {hello.cluster_id} is linked already"
                )
            logger.warning(
                "cluster %d came back as a new process: its old link ends", hello.cluster_id
            )
            self._end(old, LinkState.LOST, "the peer came back as a new process")
        # Both sides ask at once: the one with the smaller id makes the link.
        if asking and self._cluster_id < hello.cluster_id:
            raise error_for(
                LLMStatusCode.LLM_ALREADY_LINK,
                f"cluster {self._cluster_id} is linking to you already",
            )

    # -- the endpoint's handler -------------------------------------------------------------------

    def on_message(self, route: Route, envelope: Envelope, data: bytes | None) -> None:
        """See :class:`~llm_datadist_torch.links.endpoint.Handler`."""
        link, dial = self._by_route.get(route), self._dials.get(route)
        if envelope.reply:
            if link is not None:
                link.on_reply(envelope.request_id, envelope.body, data)
            elif dial is not None:
                self._on_dial_answer(dial, envelope.body)
            return
        try:
            asked = envelope.request_id != 0
            answer = self._answer(link, route, envelope.body, data, asked=asked)
        except LLMException as error:
            # The remedy is added again on the other side, from the status.
            text = str(error.args[0]) if error.args else str(error)
            answer = Refused(int(error.status_code), text), None
        except Exception as error:
            logger.exception("answering %s failed", type(envelope.body).__name__)
            answer = (
                Refused(
                    int(LLMStatusCode.LLM_FAILED), f"{type(error).__name__} at the peer: {error}"
                ),
                None,
            )
        if answer is not None and envelope.request_id:
            self.endpoint.send(route, Envelope(envelope.request_id, True, answer[0]), answer[1])
        if isinstance(envelope.body, Unlink) and not isinstance(answer and answer[0], Refused):
            self.endpoint.drop(route)

    def _answer(
        self, link: Link | None, route: Route, body: Body, data: bytes | None, *, asked: bool
    ) -> tuple[Body, bytes | None] | None:
        if isinstance(body, Hello):
            return self._on_hello(route, body), None
        if link is None:
            if not isinstance(body, Unlink):
                # We ended this link alone (force): let the other side know that it is over.
                self.endpoint.send(route, Envelope(0, False, Unlink()))
            raise error_for(
                LLMStatusCode.LLM_NOT_YET_LINK, f"cluster {self._cluster_id} has no such link"
            )
        if isinstance(body, Unlink):
            return self._on_unlink(link, asked=asked), None
        return self._owner.answer(link, body, data)

    def _on_unlink(self, link: Link, *, asked: bool) -> Body:
        if link.unlinking or not asked:
            # Not asked but told: its leases are over already, so a transfer of ours must not
            # succeed.
            self._end(link, LinkState.UNLINKED, f"cluster {link.peer} ended it", keep_route=True)
            return Done()
        if not link.try_transfer():
            raise error_for(
                LLMStatusCode.LLM_LINK_BUSY,
                f"cluster {self._cluster_id} is moving bytes on the link",
            )
        try:
            self._end(link, LinkState.UNLINKED, f"cluster {link.peer} unlinked", keep_route=True)
        finally:
            link.end_transfer()
        return Done()

    def on_lost(self, route: Route, reason: str) -> None:
        """See :class:`~llm_datadist_torch.links.endpoint.Handler`."""
        dial = self._dials.get(route)
        if dial is not None:
            refused = "refused" in reason or "unreachable" in reason
            status = LLMStatusCode.LLM_LINK_FAILED if refused else LLMStatusCode.LLM_FAILED
            dial.answer.set(error_for(status, reason, peer=dial.peer))
        link = self._by_route.get(route)
        if link is not None:
            logger.warning("link to cluster %d lost: %s", link.peer, reason)
            self._end(link, LinkState.LOST, reason)

    # -- making and ending ------------------------------------------------------------------------

    def _make(
        self, peer: int, epoch: str, route: Route, offers: dict[str, bytes], *, dialed: bool
    ) -> None:
        common = [name for name in self._transports if name in offers]
        if not common:
            raise error_for(
                LLMStatusCode.LLM_LINK_FAILED,
                f"no common transport: here {sorted(self._transports)}, there {sorted(offers)}",
                peer=peer,
            )
        link = Link(peer, epoch, route, self.endpoint, dialed)
        link.open_channel(self._transports[common[0]].connect(offers[common[0]], LinkRelay(link)))
        with self._lock:
            self._links[peer] = self._by_route[route] = link
        logger.info("linked with cluster %d, transport %s", peer, common[0])

    def _end(self, link: Link, state: LinkState, reason: str, *, keep_route: bool = False) -> None:
        link.end(state, reason)
        with self._lock:
            self._by_route.pop(link.route, None)
            # A lost link stays listed, so that its use says what happened.
            if state is LinkState.UNLINKED and self._links.get(link.peer) is link:
                del self._links[link.peer]
        self._owner.end_grants(link)
        # Whoever answers an unlink needs the route for the answer; the asking side closes it.
        if not keep_route:
            self.endpoint.drop(link.route)
