# SPDX-License-Identifier: Apache-2.0
"""The links of one instance: which there are, what keeps each of them, how they begin and end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec

from llm_datadist_torch.links.earlier_leases import EarlierLeases
from llm_datadist_torch.links.events import LinkEvents
from llm_datadist_torch.links.link import Link, LinkRelay
from llm_datadist_torch.net.connection import Connection
from llm_datadist_torch.net.endpoint import Endpoint
from llm_datadist_torch.serving.late_writers import LateWriters
from llm_datadist_torch.serving.messages import Release
from llm_datadist_torch.serving.owner import Owner
from llm_datadist_torch.serving.peer import Grant, LinkState
from llm_datadist_torch.serving.same_process import LinkEnd, SameProcessPeer
from llm_datadist_torch.transports.choice import TransportSet
from llm_datadist_torch.values.status import LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

CLUSTERS = ""
"""The hold of ``link_clusters``."""
MAX_LINKS = 4096
"""Links of one instance at a time; so many that were lost are remembered, too."""

_MOST_UNRETURNED = 64
"""Peers for which it is remembered what has to be given back when they are linked again."""


class LinkRegistry:
    """Links by peer and by connection.

    A link has owners: ``link_clusters`` and communicators. Each side counts its own, and the link
    ends for both when the last owner on one side has released it.

    Thread safety: all methods may be called from any thread and don't block.

    Args:
        epoch: Random name of this instance's life.
        owner: Where the peers' leases end.
        transports: What can move bytes.
        endpoint: What sends messages.

    Attributes:
        events: Reports changes of links.
        by_peer: All links, lost ones too, for others to look at.
        late_writers: Peers that may still write after their connection has ended.
        earlier: What this side still uses by links that have ended.
    """

    def __init__(
        self, epoch: str, owner: Owner, transports: TransportSet, endpoint: Endpoint
    ) -> None:
        self._epoch = epoch
        self._owner = owner
        self._transports = transports
        self._endpoint = endpoint
        self.events = LinkEvents()
        self.late_writers = LateWriters(endpoint.loop, owner.end_leases)
        self.earlier = EarlierLeases()
        self._unreturned: dict[str, list[Release]] = {}
        self._lock = threading.Lock()
        self.by_peer: dict[int, Link] = {}
        self._by_connection: dict[Connection, Link] = {}
        self._draining: dict[Connection, Link] = {}
        self._owners = {CLUSTERS}

    # -- looking ----------------------------------------------------------------------------------

    def get(self, peer: int) -> Link | None:
        """The link to a peer, a lost one too."""
        return self.by_peer.get(peer)

    def linked(self, peer: int) -> Link | None:
        """The link to a peer if it is up."""
        link = self.by_peer.get(peer)
        return link if link is not None and link.state is LinkState.LINKED else None

    def at(self, connection: Connection) -> Link | None:
        """The link whose messages come this way."""
        return self._by_connection.get(connection)

    def all(self) -> list[Link]:
        """All links, lost ones too."""
        with self._lock:
            return list(self.by_peer.values())

    # -- beginning and ending ---------------------------------------------------------------------

    def offers(self) -> dict[str, bytes]:
        """What each transport tells a peer."""
        return self._transports.offers()

    def announce(self, name: str) -> LinkEnd:
        """Let a peer in this process find our end of a link; to be done before it hears of it."""
        return LinkEnd(name, self._epoch, self._owner.catalog)

    def make(
        self,
        peer: int,
        epoch: str,
        connection: Connection,
        offers: dict[str, bytes],
        *,
        dialed: bool,
        owner: str,
        name: str = "",
        address: tuple[str, int] | None = None,
        replaces: Link | None = None,
        link_end: LinkEnd | None = None,
        confirm: Callable[[], None] | None = None,
    ) -> None:
        """A link has been agreed on.

        Args:
            peer: The peer's id; see :class:`Link`, also for those not named here.
            epoch: The peer's life.
            connection: The way of its messages.
            offers: What its transports say.
            dialed: Whether we asked.
            owner: What it is kept for.
            name: What both sides call it.
            address: Where the peer can be dialed again.
            replaces: The lost link that it is to take the place of.
            link_end: Our end, if it has been announced.
            confirm: Tells the peer, before anybody here can say anything on the link. Must not
                block.

        Raises:
            LLMLinkError: No transport in common, nobody here holds the link any more, what it
                replaces has been unlinked, or there are too many links.
        """
        if len(self._by_connection) >= MAX_LINKS:
            text = f"there are {MAX_LINKS} links, and no more may be"
            raise error_for(LLMStatusCode.LLM_LINK_FAILED, text, peer=peer)
        link = Link(peer, epoch, connection, self._endpoint, dialed, address, name=name)
        link.give_back_late = self._give_back_late
        link.link_end = link_end = link_end or self.announce(name)
        link.same_process_peer = SameProcessPeer.find(name, epoch, self._epoch)
        link_end.open(link)
        channel = self._transports.connect(offers, LinkRelay(link))
        link.open_channel(channel)
        with self._lock:
            before = self.by_peer.get(peer)
            held = owner in self._owners and replaces in (None, before)
            if held:
                link.owners.add(owner)
                if confirm is not None:
                    confirm()
                self.by_peer[peer] = self._by_connection[connection] = link
                self._remember_less()
        if not held:
            link.end(LinkState.UNLINKED, "nobody wants it any more")
            raise error_for(
                LLMStatusCode.LLM_LINK_FAILED, "no such communicator, or unlinked", peer=peer
            )
        for release in self._unreturned.pop(epoch, ()):
            link.post(release)
        again = before is not None and before.state is LinkState.LOST
        summary = channel.summary
        self.events.put(peer, "relinked" if again else "linked", summary)
        logger.info("linked with cluster %d: %s", peer, summary)

    def _remember_less(self) -> None:
        """Peers with ever new ids must not fill the memory with links that are lost."""
        if len(self.by_peer) > 2 * MAX_LINKS:
            for peer, link in list(self.by_peer.items()):
                if link.state is LinkState.LOST and link.address is None:
                    del self.by_peer[peer]
                    return

    def end(
        self, link: Link, state: LinkState, reason: str, *, keep_connection: bool = False
    ) -> None:
        """End a link and the peer's leases, except write leases of a peer that may still write."""
        self._forget(link, state, reason)
        if link.connection.closed:
            self.late_writers.retain(link)
        self._owner.end_grants(link)
        # The side that answers an unlink still needs the connection; the asking side closes it.
        if not keep_connection:
            self._endpoint.drop(link.connection)

    def _forget(self, link: Link, state: LinkState, reason: str) -> None:
        ended = link.end(state, reason)
        self.earlier.remember(link.peer, link.name, link.held)
        with self._lock:
            self._by_connection.pop(link.connection, None)
            listed = self.by_peer.get(link.peer) is link
            # A lost link stays listed with its owners, so that its use reports what happened, or
            # relinks it.
            if state is LinkState.UNLINKED:
                link.owners.clear()
                if listed:
                    del self.by_peer[link.peer]
        if state is LinkState.LOST and ended:
            self._owner.end_orphans(link)
            self.events.put(link.peer, "lost", reason)
        elif state is LinkState.UNLINKED and (ended or listed):
            self.events.put(link.peer, "unlinked", reason)

    # -- a peer that does not let go --------------------------------------------------------------

    def end_but_keep_leases(self, link: Link, state: LinkState, reason: str) -> None:
        """End a link whose peer may still use our caches.

        They are not freed before it says that it has finished, or its connection ends.
        """
        with self._lock:
            self._draining[link.connection] = link
        self._forget(link, state, reason)
        if not link.grants:
            self._drained(link.connection)
            link.hang_up()

    def give_back(self, connection: Connection, release: Release) -> bool:
        """A lease of a link that has ended comes back; whether the connection is of such a link."""
        link = self._draining.get(connection)
        if link is None:
            return False
        self._owner.release(link, release)
        if not link.grants:
            self._drained(connection)
            link.hang_up()
        return True

    def end_unused_leases(self, epoch: str, earlier: Mapping[str, Sequence[int]]) -> None:
        """End leases of earlier links that a peer, as it says when it links again, does not use.

        Args:
            epoch: The peer's life.
            earlier: Name of each of the links -> leases of it that are in use.
        """
        self.late_writers.keep_only(epoch, earlier)
        for connection, link in list(self._draining.items()):
            if link.epoch == epoch and link.name in earlier:
                for number in set(link.grants).difference(earlier[link.name]):
                    self.give_back(connection, Release(number, None))

    def gone(self, connection: Connection) -> None:
        """The connection has ended: so have the leases of a link that ended before.

        All but those of a peer that may still write.
        """
        self._drained(connection)

    @property
    def quarantined(self) -> list[Grant]:
        """Write leases of links that have ended: their peers may still write, for all we know."""
        draining = [grant for link in list(self._draining.values())
                    for grant in list(link.grants.values()) if grant.write]  # fmt: skip
        return [*self.late_writers.grants, *draining]

    def is_draining(self, connection: Connection) -> bool:
        """Whether the link of this connection has ended, and its peer still has leases."""
        return connection in self._draining

    def drain_all(self) -> None:
        """Nothing will come on any connection any more."""
        for connection in list(self._draining):
            self._drained(connection)

    def _drained(self, connection: Connection) -> None:
        with self._lock:
            link = self._draining.pop(connection, None)
        if link is not None:
            if connection.closed:
                self.late_writers.retain(link)
            self._owner.end_grants(link)

    def _give_back_late(self, link: Link, release: Release) -> None:
        """We give back a lease whose connection has ended: on the next link to the same peer."""
        late = msgspec.structs.replace(release, link=link.name)
        now = self.linked(link.peer)
        if now is not None and now.epoch == link.epoch:
            now.post(late)
            return
        with self._lock:
            if len(self._unreturned) >= _MOST_UNRETURNED and link.epoch not in self._unreturned:
                del self._unreturned[next(iter(self._unreturned))]
            self._unreturned.setdefault(link.epoch, []).append(late)

    # -- owners -----------------------------------------------------------------------------------

    def add_owner(self, owner: str) -> None:
        """Allow links to be kept for this owner from now on."""
        with self._lock:
            self._owners.add(owner)

    def remove_owner(self, owner: str) -> None:
        """Allow no new links for this owner; links that it still has must be released."""
        with self._lock:
            self._owners.discard(owner)

    def is_owner(self, owner: str) -> bool:
        """Whether links may be kept for this owner."""
        return owner in self._owners

    def acquire(self, link: Link, owner: str) -> None:
        """Keep a link for one more owner.

        Raises:
            LLMNotLinkedError: The link, or the communicator that asks for it, has ended.
        """
        with self._lock:
            if owner in self._owners and link.state is LinkState.LINKED and not link.leaving:
                link.owners.add(owner)
                return
        raise error_for(
            LLMStatusCode.LLM_NOT_YET_LINK,
            "the link or the communicator has ended",
            peer=link.peer,
        )

    def release(self, link: Link, owner: str) -> bool:
        """Remove an owner of a link that has others.

        Returns:
            Whether the link must be ended now, because it has no other owner.
        """
        with self._lock:
            if owner in link.owners and len(link.owners) > 1:
                link.owners.discard(owner)
                return False
            return link.owners == {owner} or link.state is not LinkState.LINKED
