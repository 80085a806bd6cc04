# SPDX-License-Identifier: Apache-2.0
"""How the members of a communicator find each other: by messages, at a listener of the first."""

from __future__ import annotations

import errno
import hashlib
import logging
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from llm_datadist_torch.links.meetings import Meeting, Meetings, Visit, check_member
from llm_datadist_torch.links.rank_table import Member
from llm_datadist_torch.net.addresses import address_towards, is_of_this_host
from llm_datadist_torch.net.endpoint import Endpoint
from llm_datadist_torch.serving.messages import (
    Body,
    EnterMeeting,
    JoinMeeting,
    MeetingMembers,
    MeetingToken,
    MemberInfo,
    Refused,
)
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

_RETRY_S = 0.02
_CONNECT_MS = 2000
_ANSWER_MS = 5000
"""How long the first member may take to say whether it lets us in."""


class Agreement(NamedTuple):
    """What all members know afterwards: a token that names this communicator, and all members."""

    token: str
    members: list[MemberInfo]


class _NotYetError(Exception):
    """This attempt has come to nothing; ``error`` is what to say if no other does better."""

    def __init__(self, error: LLMException) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Rendezvous:
    """One member's way to an :class:`Agreement`.

    The first member listens for as long as it takes; the others dial it again and again until the
    deadline, so the order in which the members come does not matter. At a port that is taken by
    another process they wait, too.

    Attributes:
        name: The communicator's.
        members: All, in order.
        place: Which of them we are.
        addresses: Hosts and ports at which the first may be, the best first.
        deadline: One for everything.
        check: Raises when it is to be given up.
        info: What we say of ourselves; called with an address of ours at which the others reach us.
        add_owner: Called with the token before any other member can dial us for it.
        meetings: This instance's.
        endpoint: What listens.
        changed: Set whenever something has happened that we may wait for.
    """

    name: str
    members: list[Member]
    place: int
    addresses: list[tuple[str, int]]
    deadline: Deadline
    check: Callable[[], None]
    info: Callable[[str], MemberInfo]
    add_owner: Callable[[str], None]
    meetings: Meetings
    endpoint: Endpoint
    changed: threading.Event = field(default_factory=threading.Event)

    def run(self) -> Agreement:
        """Meet the others. Blocks until all are there.

        Raises:
            LLMTimeoutError: Not all were there in time; it says who was missing.
            LLMParamError: The members disagree on who they are.
            LLMLinkError: This host has no such address, or the secrets differ.
        """
        attempt = self._host if self.place == 0 else self._visit
        told: LLMException | None = None
        while True:
            try:
                return attempt()
            except _NotYetError as reason:
                # That members disagree is better to know than that the time is up.
                if told is None or told.status_code == LLMStatusCode.LLM_TIMEOUT:
                    told = reason.error
            self.changed.clear()
            self.check()
            if self.deadline.expired:
                raise told
            self.changed.wait(_RETRY_S)

    # -- the first member -------------------------------------------------------------------------

    def _host(self) -> Agreement:
        address = self._own_address()
        self._listen(*address)
        try:
            token = uuid.uuid4().hex
            self.add_owner(token)
            info = self.info(address[0])
            meeting = Meeting(self._digest, self.members, token, info, self.changed)
            self.meetings.begin(meeting)
            try:
                while meeting.complete is None:
                    self._wait(
                        lambda: f"cluster {', '.join(map(str, meeting.missing))} did not come"
                    )
                return Agreement(token, meeting.complete)
            finally:
                self.meetings.end(meeting)
        finally:
            self.endpoint.close_listener(*address)

    def _own_address(self) -> tuple[str, int]:
        """The first of the addresses that this host has, else the last."""
        *others, last = self.addresses
        ours = [address for address in others if is_of_this_host(address[0])]
        if others and not ours:
            logger.debug(
                "linking %r: %s of the rank table is no address of this host, so members on other"
                " hosts are not met; give the host_ip of rank 0 where there are any",
                self.name,
                others[0][0],
            )
        return ours[0] if ours else last

    def _listen(self, host: str, port: int) -> None:
        try:
            self.endpoint.open_listener(host, port)
        except OSError as error:
            text = f"can't meet at {host}:{port}: {error.strerror}"
            if error.errno == errno.EADDRINUSE:
                raise _NotYetError(self._timeout(text)) from None
            raise error_for(
                LLMStatusCode.LLM_LINK_FAILED,
                text,
                op="link",
                remedy="give the host_ip of rank 0 in the rank_table, or rendezvous='ip:port'.",
            ) from None

    # -- the others -------------------------------------------------------------------------------

    def _visit(self) -> Agreement:
        errors = []
        # Loopback comes last, and answers at once.
        for address in reversed(self.addresses):
            try:
                return self._visit_at(address)
            except _NotYetError as reason:
                errors.append(reason.error)
        # What is known for sure is better to know than that nobody came.
        sure = [error for error in errors if error.status_code != LLMStatusCode.LLM_TIMEOUT]
        raise _NotYetError((sure or errors)[-1])

    def _visit_at(self, address: tuple[str, int]) -> Agreement:
        visit = self.meetings.visit(address, self.changed)
        try:
            soon = Deadline.after_ms(_CONNECT_MS)
            while not visit.connected:
                self._wait_for_answer(visit, soon)
            members = [(member.rank, member.cluster_id) for member in self.members]
            token = self._query(
                visit, JoinMeeting(self._digest, members, self.place), Deadline.after_ms(_ANSWER_MS)
            )
            if not isinstance(token, MeetingToken):
                raise self._unexpected(visit, token)
            self.add_owner(token.token)
            info = self.info(self._address_towards(visit))
            answer = self._query(visit, EnterMeeting(info))
        finally:
            self.meetings.leave(visit)
        if not isinstance(answer, MeetingMembers) or len(answer.members) != len(self.members):
            raise self._unexpected(visit, answer)
        try:
            for said, member in zip(answer.members, self.members, strict=True):
                check_member(said, member)
        except LLMException as error:
            raise _NotYetError(error) from None
        return Agreement(token.token, answer.members)

    def _query(self, visit: Visit, body: Body, soon: Deadline | None = None) -> Body:
        visit.send(body)
        while visit.answer is None:
            self._wait_for_answer(visit, soon)
        answer = visit.answer
        if isinstance(answer, Refused):
            host, port = visit.address
            where = f"cluster {self.members[0].cluster_id} at {host}:{port}"
            if answer.status != int(LLMStatusCode.LLM_PARAM_INVALID):
                raise _NotYetError(self._timeout(f"{where} says: {answer.text}"))
            ours = [tuple(member) for member in self.members]
            raise _NotYetError(
                param_error(
                    f"linking {self.name!r} as {ours} (rank, cluster id): {where} says:"
                    f" {answer.text}",
                    remedy="give all members the same cluster_rank_info.",
                )
            )
        return answer

    def _wait_for_answer(self, visit: Visit, soon: Deadline | None) -> None:
        if visit.failure is not None:
            if "link_secret" in visit.lost:
                raise _NotYetError(visit.failure)
            raise _NotYetError(self._timeout(self._absent(visit, visit.lost)))
        if soon is not None and soon.expired:
            raise _NotYetError(self._timeout(self._absent(visit, "it does not answer")))
        fault = (
            "not all members have come"
            if soon is None
            else self._absent(visit, "it does not answer")
        )
        self._wait(lambda: fault, soon)

    def _address_towards(self, visit: Visit) -> str:
        try:
            return address_towards(*visit.address)
        except OSError as error:
            raise _NotYetError(self._timeout(self._absent(visit, str(error)))) from None

    def _absent(self, visit: Visit, reason: str) -> str:
        host, port = visit.address
        return f"cluster {self.members[0].cluster_id} is not at {host}:{port}: {reason}"

    def _unexpected(self, visit: Visit, answer: Body) -> _NotYetError:
        text = self._absent(visit, f"it answers {type(answer).__name__}")
        return _NotYetError(self._timeout(text))

    # -- all --------------------------------------------------------------------------------------

    def _wait(self, fault: Callable[[], str], soon: Deadline | None = None) -> None:
        """Wait until something has happened, at most until the deadline."""
        left = self.deadline.remaining_s()
        self.changed.wait(left if soon is None else min(left, soon.remaining_s()))
        self.changed.clear()
        self.check()
        if self.deadline.expired:
            raise _NotYetError(self._timeout(fault()))

    @property
    def _digest(self) -> str:
        return hashlib.sha256(self.name.encode("utf-8", "surrogatepass")).hexdigest()

    def _timeout(self, text: str) -> LLMException:
        return error_for(
            LLMStatusCode.LLM_TIMEOUT,
            f"linking {self.name!r} took more than {self.deadline.budget_ms} ms: {text}",
            op="link",
            remedy="all members must call link() with the same arguments; see its timeout.",
        )
