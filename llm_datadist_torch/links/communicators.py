# SPDX-License-Identifier: Apache-2.0
"""Communicators: links among two to four instances, made together (reference API, 11.4)."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from llm_datadist_torch.links.rank_table import Member
from llm_datadist_torch.links.rendezvous import Rendezvous
from llm_datadist_torch.links.table import LinkTable
from llm_datadist_torch.links.work import Work
from llm_datadist_torch.links.workers import WorkerPool
from llm_datadist_torch.serving.messages import MemberInfo
from llm_datadist_torch.serving.peer import LinkState
from llm_datadist_torch.values.checks import param_error
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.enums import RegisterMemStatus
from llm_datadist_torch.values.status import LLMException, LLMStatusCode, error_for

logger = logging.getLogger("llm_datadist_torch")

MAX_COMMUNICATORS = 512
_LOOK_S = 0.005
_GIVE_UP_MS = 1000
# A link that is ending, or a peer that dials us at the same time: the next look shows a link.
_PASSING = (LLMStatusCode.LLM_ALREADY_LINK, LLMStatusCode.LLM_NOT_YET_LINK)


@dataclass(eq=False)
class Communicator:
    """One call of ``link``.

    Attributes:
        name: Its name; several may have the same.
        members: All, in order.
        place: Which of them we are.
        addresses: Where the members may meet, the best first.
        deadline: By when all links must be there.
        token: What its links are held for; "" until the members have met.
    """

    name: str
    members: list[Member]
    place: int
    addresses: list[tuple[str, int]]
    deadline: Deadline
    token: str = ""


class Communicators:
    """The communicators of one instance.

    Each makes, in the background, a link to every other member, or shares the one that is there.
    Of two members, the one of the higher rank dials.

    Thread safety: all methods may be called from any thread.

    Args:
        links: Where the links are.
        workers: Who makes them.
    """

    def __init__(self, links: LinkTable, workers: WorkerPool) -> None:
        self._links = links
        self._workers = workers
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._all: dict[int, tuple[Communicator, Work]] = {}

    def start(
        self,
        name: str,
        members: list[Member],
        addresses: list[tuple[str, int]],
        deadline: Deadline,
    ) -> int:
        """Begin to link with all other members. Does not block.

        Returns:
            The communicator's id.

        Raises:
            LLMParamError: We are no member, or there are too many communicators.
            LLMException: LLM_FAILED: the instance is being finalized.
        """
        me = self._links.identity.cluster_id
        places = [place for place, member in enumerate(members) if member.cluster_id == me]
        if not places:
            raise param_error(
                f"cluster {me} is not in the cluster_rank_info",
                remedy="give all members, this one too.",
            )
        comm = Communicator(name, members, places[0], addresses, deadline)
        work = Work(lambda work: self._link(comm, work), 1)
        with self._lock:
            if len(self._all) >= MAX_COMMUNICATORS:
                raise param_error(
                    f"there are {len(self._all)} communicators, and no more than"
                    f" {MAX_COMMUNICATORS} may be",
                    remedy="unlink() communicators that are not needed.",
                )
            comm_id = next(self._ids)
            self._all[comm_id] = comm, work
        try:
            self._workers.submit(work)
        except LLMException:
            with self._lock:
                del self._all[comm_id]
            raise
        return comm_id

    def status(self, comm_id: int) -> RegisterMemStatus:
        """How far a communicator is.

        Raises:
            LLMNotLinkedError: There is none of this id.
        """
        _, work = self._find(comm_id)
        if not work.done:
            return RegisterMemStatus.PREPARING
        return RegisterMemStatus.OK if work.failure() is None else RegisterMemStatus.FAILED

    def wait(self, comm_id: int) -> None:
        """Wait until a communicator is ready, at most until its deadline.

        Raises:
            LLMException: Why it will not be.
        """
        _, work = self._find(comm_id)
        work.wait(None)
        failure = work.failure()
        if failure is not None:
            raise failure

    @property
    def preparing(self) -> int:
        """How many are not ready yet."""
        return sum(not work.done for _, work in list(self._all.values()))

    def end(self, comm_id: int, deadline: Deadline) -> None:
        """End a communicator on this side, and the links that nothing else keeps.

        Raises:
            LLMNotLinkedError: There is none of this id.
            LLMLinkError: LLM_UNLINK_FAILED: transfers of ours ran until the deadline. It can be
                tried again.
        """
        comm, work = self._find(comm_id)
        work.cancel()
        try:
            self._release(comm, deadline)
        except LLMException as error:
            raise error_for(
                LLMStatusCode.LLM_UNLINK_FAILED, str(error), op="unlink", peer=error.peer
            ) from error
        with self._lock:
            self._all.pop(comm_id, None)

    def close(self, deadline: Deadline) -> None:
        """Give up what is being prepared. The links end with the table's."""
        for comm, work in list(self._all.values()):
            work.cancel()
            if comm.token:
                self._links.cancel_dials(comm.token)
        self._workers.close(deadline)

    def _find(self, comm_id: int) -> tuple[Communicator, Work]:
        found = self._all.get(comm_id)
        if found is None:
            raise error_for(
                LLMStatusCode.LLM_NOT_YET_LINK,
                f"there is no communicator {comm_id}",
                remedy="use the id that link() has returned, before unlink().",
            )
        return found

    # -- in the background ------------------------------------------------------------------------

    def _link(self, comm: Communicator, work: Work) -> None:
        try:
            rendezvous = Rendezvous(
                comm.name,
                comm.members,
                comm.place,
                comm.addresses,
                comm.deadline,
                work.check,
                self._info,
                lambda token: self._add_owner(comm, token, work),
                self._links.meetings,
                self._links.endpoint,
            )
            # It waits for nothing that lasts longer than the work.
            work.when_done(rendezvous.changed.set)
            token, members = rendezvous.run()
            self._connect(comm, token, members, work)
        except LLMException as error:
            logger.warning("linking %r failed: %s", comm.name, error)
            work.fail(0, error)
            with suppress(LLMException):
                self._release(comm, Deadline.after_ms(_GIVE_UP_MS))
        else:
            work.succeed(0)

    def _info(self, host: str) -> MemberInfo:
        """What we tell the others; ``host`` is an address of ours that they reach."""
        me = self._links.identity
        try:
            port = self._links.endpoint.listen_on(host)
            return MemberInfo(me.cluster_id, me.epoch, host, port)
        except OSError as error:
            raise error_for(LLMStatusCode.LLM_LINK_FAILED, str(error), op="link") from error

    def _add_owner(self, comm: Communicator, token: str, work: Work) -> None:
        registry = self._links.registry
        if comm.token:
            registry.remove_owner(comm.token)
        comm.token = token
        registry.add_owner(token)
        # A thread that cancels removes only the token that it sees.
        if work.done:
            registry.remove_owner(token)
        work.check()

    def _connect(
        self, comm: Communicator, token: str, members: list[MemberInfo], work: Work
    ) -> None:
        lower, higher = members[: comm.place], members[comm.place + 1 :]
        self._end_stale_links([*lower, *higher])
        while lower := [member for member in lower if not self._held(member, token)]:
            work.check()
            targets = [(member.cluster_id, member.host, member.port) for member in lower]
            results = self._links.link_all(targets, comm.deadline, token)
            for member, status in zip(lower, results, strict=True):
                if status not in (LLMStatusCode.LLM_SUCCESS, *_PASSING):
                    raise _link_error(status, member, "could not be linked")
            _check_time(comm.deadline, lower)
        while higher := [member for member in higher if not self._held(member, token)]:
            work.check()
            _check_time(comm.deadline, higher)
            time.sleep(_LOOK_S)

    def _held(self, member: MemberInfo, token: str) -> bool:
        link = self._links.registry.linked(member.cluster_id)
        return link is not None and token in link.owners

    def _end_stale_links(self, members: list[MemberInfo]) -> None:
        for member in members:
            link = self._links.registry.linked(member.cluster_id)
            if link is not None and link.epoch != member.epoch:
                reason = "the peer came back as a new process"
                self._links.registry.end_but_keep_leases(link, LinkState.LOST, reason)

    def _release(self, comm: Communicator, deadline: Deadline) -> None:
        """Stop holding links for this communicator; its peers can't hold them for it any more."""
        token = comm.token
        if not token:
            return
        self._links.registry.remove_owner(token)
        self._links.cancel_dials(token)
        for place, member in enumerate(comm.members):
            if place != comm.place:
                self._links.unlink_here(member.cluster_id, deadline, token)


def _check_time(deadline: Deadline, missing: list[MemberInfo]) -> None:
    if deadline.expired:
        raise _link_error(
            LLMStatusCode.LLM_TIMEOUT, missing[0], f"was not linked within {deadline.budget_ms} ms"
        )


def _link_error(status: LLMStatusCode, member: MemberInfo, fault: str) -> LLMException:
    return error_for(
        status,
        f"cluster {member.cluster_id} at {member.host}:{member.port} {fault}",
        op="link",
        peer=member.cluster_id,
    )
