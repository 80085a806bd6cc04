# SPDX-License-Identifier: Apache-2.0
"""How the members of a communicator find each other: through torch's TCPStore at the first one."""

from __future__ import annotations

import errno
import hashlib
import logging
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

import msgspec

from llm_datadist_torch.links.auth import MessageAuthenticator
from llm_datadist_torch.links.conduit import CancellableProxy
from llm_datadist_torch.links.rank_table import Member
from llm_datadist_torch.net.addresses import is_of_this_host, resolve
from llm_datadist_torch.values.checks import UINT16_MAX, param_error
from llm_datadist_torch.values.deadline import Deadline
from llm_datadist_torch.values.status import LLMException, LLMLinkError, LLMStatusCode, error_for

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

logger = logging.getLogger("llm_datadist_torch")

_T = TypeVar("_T")

_LOOK_S = 0.005
_RETRY_S = 0.02
_CONNECT_S = 2.0


class Card(msgspec.Struct, frozen=True, array_like=True):
    """What a member tells the others: who it is, and where it listens."""

    cluster_id: int
    epoch: str
    host: str
    port: Annotated[int, msgspec.Meta(ge=1, le=UINT16_MAX)]


class Agreement(NamedTuple):
    """What all members know afterwards: a token that names this communicator, and all cards."""

    token: str
    cards: list[Card]


class _NotYetError(Exception):
    """This attempt has come to nothing; ``error`` is what to say if no other does better."""

    def __init__(self, error: LLMException) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Rendezvous:
    """One member's way to an :class:`Agreement`.

    The first member hosts a TCPStore for as long as it takes; the others look for it again and
    again until the deadline, so the order in which the members come does not matter. At a port
    that is taken (by another communicator, or by an earlier one of the same name) they wait, too.

    Attributes:
        name: The communicator's.
        members: All, in order.
        seat: Which of them we are.
        addresses: Hosts and ports at which the first may be, the best first.
        deadline: One for everything.
        check: Raises when it is to be given up.
        card: Makes our card; called with an address of ours at which the others reach us.
        add_owner: Called with the token before any other member can have heard of us.
        seal: Marks what is said, so that nobody without the secret can say it.
    """

    name: str
    members: list[Member]
    seat: int
    addresses: list[tuple[str, int]]
    deadline: Deadline
    check: Callable[[], None]
    card: Callable[[str], Card]
    add_owner: Callable[[str], None]
    seal: MessageAuthenticator

    def run(self) -> Agreement:
        """Meet the others. Blocks until all are there.

        Raises:
            LLMTimeoutError: Not all were there in time; it says who was missing.
            LLMParamError: The members disagree on who they are.
            LLMLinkError: This host has no such address.
        """
        nonce = uuid.uuid4().hex
        attempt = self._host if self.seat == 0 else lambda: self._visit(nonce)
        told: LLMException | None = None
        while True:
            try:
                return attempt()
            except _NotYetError as reason:
                # That members disagree is better to know than that the time is up.
                if told is None or told.status_code == LLMStatusCode.LLM_TIMEOUT:
                    told = reason.error
            # Not while the reason is handled: its frames would keep the store, and its port.
            self.check()
            if self.deadline.expired:
                raise told
            time.sleep(_RETRY_S)

    # -- the first member -------------------------------------------------------------------------

    def _host(self) -> Agreement:
        address = self._address()
        listener = self._bind(address)
        store = self._call(lambda: _new_store(address, self.deadline, listener.detach()))
        # It invites the others.
        self._put(store, "members", self._members_text())
        nonces = self._nonces(store)
        # Made of what each of them has just made up: nothing said earlier is good for it.
        token = _token_of([uuid.uuid4().hex, *nonces])
        self.add_owner(token)
        self._put_card(store, address[0], token)
        self._put(store, "token", msgspec.msgpack.encode((token, nonces)))
        cards = self._cards(store, token)
        # The store lives until the others have read everything.
        self._wait_for(store, "left", "did not take part to the end")
        return Agreement(token, cards)

    def _nonces(self, store: TCPStore) -> list[str]:
        self._wait_for(store, "seat", "did not come")
        others = range(1, len(self.members))
        return [self._get(store, f"seat/{seat}").decode("ascii", "replace") for seat in others]

    def _bind(self, address: tuple[str, int]) -> socket.socket:
        host, port = address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server(address, family=family, backlog=16)
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

    def _address(self) -> tuple[str, int]:
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

    # -- the others -------------------------------------------------------------------------------

    def _visit(self, nonce: str) -> Agreement:
        far = self._reach()
        here = far.getsockname()[0]
        with CancellableProxy(far, self._cancelled) as proxy:
            near = ("127.0.0.1", proxy.port)
            store = self._call(lambda: _new_store(near, self.deadline))
            agreement = self._take_part(store, here, nonce)
            # set() does not wait for its arrival.
            del store
            proxy.flush()
            return agreement

    def _reach(self) -> socket.socket:
        """Connect to the first member, wherever it listens."""
        refusals = []
        # Loopback comes last, and answers at once.
        for host, port in reversed(self.addresses):
            try:
                return socket.create_connection(
                    (host, port), timeout=min(_CONNECT_S, self.deadline.remaining_s() + 1e-3)
                )
            except OSError as error:
                refusals.append(f"at {host}:{port}: {error}")
        raise _NotYetError(
            self._timeout(f"cluster {self.members[0].cluster_id} is not {', nor '.join(refusals)}")
        )

    def _cancelled(self) -> bool:
        try:
            self.check()
        except Exception:  # noqa: BLE001  whatever it is, the thread that waits will say it
            return True
        return self.deadline.expired

    def _take_part(self, store: TCPStore, here: str, nonce: str) -> Agreement:
        if not self._has(store, "members"):
            raise _NotYetError(self._timeout("another communicator meets at the same port"))
        theirs = self._get(store, "members")
        if theirs != self._members_text():
            text = theirs.decode("utf-8", "replace")
            raise _NotYetError(
                param_error(
                    f"cluster {self.members[0].cluster_id} links {self.name!r} as {text}, we as"
                    f" {self._members_text().decode()} (rank, cluster id)",
                    remedy="give all members the same cluster_rank_info.",
                )
            )
        what = f"seat/{self.seat}"
        sealed = self._sealed(what, nonce.encode()).hex()
        taken = self._call(lambda: store.compare_set(self._key(what), "", sealed))
        if bytes(taken) != sealed.encode():
            raise _NotYetError(
                self._timeout("an earlier communicator of this name has not ended its meeting")
            )
        token = self._token(store, nonce)
        self.add_owner(token)
        self._put_card(store, here, token)
        cards = self._cards(store, token)
        self._put(store, f"left/{self.seat}", b"")
        return Agreement(token, cards)

    def _token(self, store: TCPStore, nonce: str) -> str:
        while not self._has(store, "token"):
            self.check()
            if self.deadline.expired:
                raise _NotYetError(self._timeout("not all members have come"))
            time.sleep(_LOOK_S)
        try:
            token, nonces = msgspec.msgpack.decode(
                self._get(store, "token"), type=tuple[str, list[str]]
            )
        except msgspec.DecodeError as error:
            raise _NotYetError(self._timeout(f"what is said there is no token: {error}")) from None
        if len(nonces) != len(self.members) - 1 or nonces[self.seat - 1] != nonce:
            raise _NotYetError(self._timeout("what is said there is of another meeting"))
        return token

    # -- all --------------------------------------------------------------------------------------

    def _cards(self, store: TCPStore, token: str) -> list[Card]:
        self._wait_for(store, "card", "did not come")
        cards = []
        for seat, member in enumerate(self.members):
            try:
                card = msgspec.msgpack.decode(self._get(store, f"card/{seat}", token), type=Card)
                resolve(card.host, card.port)
            except ValueError as error:  # msgspec's are, too
                raise _NotYetError(
                    self._timeout(f"what is said there is no card: {error}")
                ) from None
            if card.cluster_id != member.cluster_id:
                raise _NotYetError(self._timeout(f"cluster {card.cluster_id} is in seat {seat}"))
            cards.append(card)
        return cards

    def _wait_for(self, store: TCPStore, what: str, fault: str) -> None:
        """Wait until each other member has said ``what``."""
        others = [seat for seat in range(len(self.members)) if seat != self.seat]
        while others:
            others = [seat for seat in others if not self._has(store, f"{what}/{seat}")]
            self.check()
            if others and self.deadline.expired:
                clusters = ", ".join(str(self.members[seat].cluster_id) for seat in others)
                raise _NotYetError(self._timeout(f"cluster {clusters} {fault}"))
            if others:
                time.sleep(_LOOK_S)

    def _put_card(self, store: TCPStore, here: str, token: str) -> None:
        card = msgspec.msgpack.encode(self.card(here))
        self._put(store, f"card/{self.seat}", card, token)

    def _members_text(self) -> bytes:
        return str([tuple(member) for member in self.members]).encode()

    def _key(self, what: str) -> str:
        name = hashlib.sha256(self.name.encode("utf-8", "surrogatepass")).hexdigest()
        return f"llm_datadist_torch/{name}/{what}"

    def _sealed(self, what: str, value: bytes, token: str = "") -> bytes:
        return self.seal.close((self.name, what, token), value)

    def _put(self, store: TCPStore, what: str, value: bytes, token: str = "") -> None:
        # In hex, as everything: compare_set() takes text only.
        sealed = self._sealed(what, value, token).hex()
        self._call(lambda: store.set(self._key(what), sealed))

    def _get(self, store: TCPStore, what: str, token: str = "") -> bytes:
        told = bytes(self._call(lambda: store.get(self._key(what))))
        try:
            return self.seal.open((self.name, what, token), bytes.fromhex(told.decode("ascii")))
        except ValueError:
            raise _NotYetError(self._timeout(f"what is said there as {what} is none")) from None
        except LLMLinkError as error:
            # Whoever reaches the meeting can write into it: it is tried again until the deadline.
            raise _NotYetError(error) from None

    def _has(self, store: TCPStore, what: str) -> bool:
        return self._call(lambda: store.check([self._key(what)]))

    def _call(self, call: Callable[[], _T]) -> _T:
        """Do something with a store, whose other end may vanish at any time."""
        try:
            return call()
        except LLMException:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise _NotYetError(self._timeout(f"the meeting broke off: {reason}")) from None

    def _timeout(self, text: str) -> LLMException:
        return error_for(
            LLMStatusCode.LLM_TIMEOUT,
            f"linking {self.name!r} took more than {self.deadline.budget_ms} ms: {text}",
            op="link",
            remedy="all members must call link() with the same arguments; see its timeout.",
        )


def _token_of(nonces: list[str]) -> str:
    return hashlib.sha256("/".join(nonces).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _new_store(
    address: tuple[str, int], deadline: Deadline, listener: int | None = None
) -> TCPStore:
    """Connect to a store, or (with a listening socket) be the one that others connect to."""
    # Not every build of torch has it, and only this needs it.
    try:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]
    except ImportError:
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            "this torch was built without torch.distributed",
            op="link",
            remedy="use link_clusters().",
        ) from None
    # This long it tries to connect; what follows, we never wait in.
    patience = min(_CONNECT_S, deadline.remaining_s() + 1e-3)
    return TCPStore(
        *address,
        is_master=listener is not None,
        wait_for_workers=False,
        timeout=timedelta(seconds=patience),
        master_listen_fd=listener,
    )
