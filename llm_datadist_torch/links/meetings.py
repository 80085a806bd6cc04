# SPDX-License-Identifier: Apache-2.0
"""Messages between the members of a communicator that meet, as the I/O thread sees them.

The first member opens a meeting; each other member dials it, joins (and gets the communicator's
token), prepares to be dialed for that token, and enters. Once all have entered, everybody gets the
list of members, so that a member that is dialed after that knows the token already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from llm_datadist_torch.links.link import SHARE_IT
from llm_datadist_torch.links.rank_table import Member
from llm_datadist_torch.net.addresses import resolve
from llm_datadist_torch.net.connection import Connection
from llm_datadist_torch.net.endpoint import Endpoint
from llm_datadist_torch.serving.messages import (
    Body,
    EnterMeeting,
    Envelope,
    JoinMeeting,
    MeetingMembers,
    MeetingToken,
    MemberInfo,
    Refused,
    encode,
)
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

Reply = Callable[[Body], None]


@dataclass(eq=False)
class Seat:
    """The place of one member in a meeting, taken by a connection until that ends.

    Attributes:
        connection: The member's.
        reply: Answers the member's :class:`EnterMeeting`; None before that.
        info: What the member says of itself; None before it has entered.
    """

    connection: Connection
    reply: Reply | None = None
    info: MemberInfo | None = None


@dataclass(eq=False)
class Meeting:
    """One communicator's meeting at this instance, which is the communicator's first member.

    Attributes:
        name: SHA-256 of the communicator's name.
        members: All, in order.
        token: Random name of the communicator as an owner of links.
        info: What the first member says of itself.
        changed: Set whenever something has happened.
        seats: The other members that have come, by their place in ``members``.
        complete: What all members say of themselves, once all are there.
    """

    name: str
    members: list[Member]
    token: str
    info: MemberInfo
    changed: threading.Event
    seats: dict[int, Seat] = field(default_factory=dict)
    complete: list[MemberInfo] | None = None

    @property
    def missing(self) -> list[int]:
        """Ids of the clusters that have not entered."""
        entered = {place for place, seat in list(self.seats.items()) if seat.info is not None}
        return [m.cluster_id for place, m in enumerate(self.members) if place not in {0, *entered}]


@dataclass(eq=False)
class Visit:
    """The connection of a member to the first one.

    Attributes:
        connection: The connection.
        address: Host and port where the first member is looked for.
        changed: Set whenever something has happened.
        connected: Whether the connection is up.
        lost: Why it has ended; "" if it has not.
        answer: The last answer.
    """

    connection: Connection
    address: tuple[str, int]
    changed: threading.Event
    connected: bool = False
    lost: str = ""
    answer: Body | None = None

    def send(self, body: Body) -> None:
        """Send a request. Its answer will be ``answer``."""
        self.answer = None
        self.connection.send(encode(Envelope(1, False, body)))

    @property
    def failure(self) -> LLMException | None:
        """Why nothing more will come of it."""
        if not self.lost:
            return None
        status = LLMStatusCode.LLM_LINK_FAILED
        remedy = SHARE_IT if "link_secret" in self.lost else None
        return error_for(status, self.lost, op="link", remedy=remedy)


class Meetings:
    """The meetings that one instance hosts, and its visits to those of others.

    A connection that has a seat in a meeting is kept for as long as the meeting lasts, unlike that
    of a stranger. There are no more seats than members that this instance itself has named.

    Thread safety: ``begin``, ``end``, ``visit`` and ``leave`` may be called from any thread;
    ``on_*`` come from the I/O thread, to which all other state belongs.

    Args:
        endpoint: Its connections.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._open: list[Meeting] = []
        self._seats: dict[Connection, tuple[Meeting, int]] = {}
        self._visits: dict[Connection, Visit] = {}

    # -- the first member -------------------------------------------------------------------------

    def begin(self, meeting: Meeting) -> None:
        """Let members in, those of the meeting that began first before those of later ones."""
        self._endpoint.loop.submit(lambda: self._open.append(meeting))

    def end(self, meeting: Meeting) -> None:
        """Let nobody in any more. Members that wait are told, and try again."""
        self._endpoint.loop.submit(lambda: self._end(meeting))

    def _end(self, meeting: Meeting) -> None:
        if meeting not in self._open:
            return
        self._open.remove(meeting)
        text = "the first member has given up"
        refused = Refused(int(LLMStatusCode.LLM_NOT_YET_LINK), text)
        for seat in list(meeting.seats.values()):
            self._answer(seat, refused)

    def _answer(self, seat: Seat, body: Body) -> None:
        """Answer a member, which then closes its connection."""
        del self._seats[seat.connection]
        if seat.reply is not None:
            seat.reply(body)
        self._endpoint.drop(seat.connection)

    def has_joined(self, connection: Connection) -> bool:
        """Whether somebody takes part in a meeting by this connection."""
        return connection in self._seats

    def on_join(self, connection: Connection, body: JoinMeeting) -> MeetingToken:
        """A member has come.

        Raises:
            LLMException: Why it can't take part.
        """
        members = [Member(*member) for member in body.members]
        named = [meeting for meeting in self._open if meeting.name == body.name]
        if not named:
            raise error_for(LLMStatusCode.LLM_NOT_YET_LINK, "no such communicator meets here")
        fitting = [meeting for meeting in named if meeting.members == members]
        if not fitting:
            raise param_error(f"the members are {_text_of(named[0].members)} (rank, cluster id)")
        if not 0 < body.place < len(members):
            raise param_error(f"place {body.place} is none of members 1 to {len(members) - 1}")
        for meeting in fitting:
            if body.place not in meeting.seats:
                meeting.seats[body.place] = Seat(connection)
                self._seats[connection] = meeting, body.place
                self._endpoint.keep(connection)
                return MeetingToken(meeting.token)
        raise error_for(
            LLMStatusCode.LLM_LINK_BUSY,
            "an earlier communicator of this name has not ended its meeting",
        )

    def on_enter(self, connection: Connection, body: EnterMeeting, reply: Reply) -> None:
        """A member that has joined is ready to be dialed.

        Raises:
            LLMException: It has not joined, or is another than its place is for.
        """
        if connection not in self._seats:
            raise error_for(LLMStatusCode.LLM_NOT_YET_LINK, "this connection has joined no meeting")
        meeting, place = self._seats[connection]
        check_member(body.member, meeting.members[place])
        seat = meeting.seats[place]
        seat.reply, seat.info = reply, body.member
        if not meeting.missing:
            self._complete(meeting)

    def _complete(self, meeting: Meeting) -> None:
        others = [seat for _, seat in sorted(meeting.seats.items())]
        members = [meeting.info, *(seat.info for seat in others if seat.info is not None)]
        self._open.remove(meeting)
        for seat in others:
            self._answer(seat, MeetingMembers(members))
        meeting.complete = members
        meeting.changed.set()

    # -- the others -------------------------------------------------------------------------------

    def visit(self, address: tuple[str, int], changed: threading.Event) -> Visit:
        """Dial the first member. Does not block; ``leave`` ends it."""
        visit = Visit(self._endpoint.new_connection(), address, changed)
        self._visits[visit.connection] = visit
        self._endpoint.connect(visit.connection, *address)
        return visit

    def leave(self, visit: Visit) -> None:
        """Close the connection."""
        self._visits.pop(visit.connection, None)
        self._endpoint.drop(visit.connection)

    def on_connected(self, connection: Connection) -> bool:
        """A dialed connection is up; whether it is a visit."""
        visit = self._visits.get(connection)
        if visit is not None:
            visit.connected = True
            visit.changed.set()
        return visit is not None

    def on_answer(self, connection: Connection, body: Body) -> bool:
        """An answer has come; whether it is one to a visit."""
        visit = self._visits.get(connection)
        if visit is not None:
            visit.answer = body
            visit.changed.set()
        return visit is not None

    def on_lost(self, connection: Connection, reason: str) -> None:
        """A connection has ended: a seat is free again, or a visit has come to nothing."""
        meeting, place = self._seats.pop(connection, (None, 0))
        if meeting is not None:
            del meeting.seats[place]
            meeting.changed.set()
        visit = self._visits.get(connection)
        if visit is not None:
            visit.lost = reason
            visit.changed.set()


def check_member(info: MemberInfo, member: Member) -> None:
    """Check what a member says of itself.

    Raises:
        LLMParamError: It is another member, or can't be dialed.
    """
    if info.cluster_id != member.cluster_id:
        raise param_error(f"cluster {info.cluster_id} takes the place of {member.cluster_id}")
    try:
        resolve(info.host, info.port)
    except ValueError as error:
        raise param_error(f"cluster {info.cluster_id} gives no address: {error}") from None


def _text_of(members: list[Member]) -> str:
    return str([tuple(member) for member in members])
