# SPDX-License-Identifier: Apache-2.0
"""Strangers where members of a rank table meet: typed errors in time, and nobody else suffers."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from llm_datadist_torch.links.auth import MessageAuthenticator
from llm_datadist_torch.links.communicating import RENDEZVOUS_VARIABLE
from llm_datadist_torch.links.rank_table import Member
from llm_datadist_torch.links.rendezvous import Rendezvous
from llm_datadist_torch.values.deadline import Deadline
from tests.faults.helpers import OK, PEER, Peers, pull, start_here, start_peer
from tests.peers import Peer, Service, eventually
from tests.transfer.helpers import free_port
from tests.transfer.tables import TABLE, WAIT_MS, members
from tests.wire import GREETING

NAME = "meeting"
# Cluster 1 is linked with a peer of its own all the time; 11, 12 and 13 want to meet.
MEMBERS = members(11, 12, 13)
SHORT_MS = 1500


@pytest.fixture
def bystander(here: Service, peers: Peers) -> Service:
    port = start_peer(peers(), 7)
    start_here(here)
    assert here.link(PEER, port) == OK
    return here


def start_members(peers: Peers, point: str, options: dict[str, str]) -> list[Peer]:
    made = [peers() for _ in MEMBERS]
    for cluster_id, peer in zip(MEMBERS, made, strict=True):
        peer.call("set_environment", {RENDEZVOUS_VARIABLE: point})
        peer.call("note_paths")
        peer.call("start", cluster_id, listen=None, options=options)
    return made


def meet(some: list[Peer], timeout_ms: int) -> list[str]:
    """What came of it for each: "" or the status of the error that was raised."""
    for peer in some:
        peer.begin("try_link_by_table", NAME, MEMBERS, TABLE, timeout_ms)
    return [peer.answer() for peer in some]


def all_meet(everybody: list[Peer]) -> None:
    assert meet(everybody, WAIT_MS) == [""] * len(MEMBERS)
    for cluster_id, peer in zip(MEMBERS, everybody, strict=True):
        others = dict.fromkeys(set(MEMBERS) - {cluster_id}, "linked")
        assert peer.call("link_states") == others


@contextmanager
def stranger(said: bytes, *, stays: bool) -> Iterator[int]:
    """Somebody at the meeting point who says this to whoever comes; yields the port."""
    done, kept = threading.Event(), []

    def serve() -> None:
        while not done.is_set():
            with suppress(OSError):
                it, _ = server.accept()
                it.sendall(said)
                if stays:
                    kept.append(it)
                else:
                    it.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            done.set()
            thread.join()
            for it in kept:
                it.close()


SAID = {
    "nothing, and leaves": (b"", False),
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
    "as we do": (GREETING, True),
    "noise": (random.Random(1).randbytes(100_000), True),
    "large numbers": (b"\xff" * 4096, True),
}


@pytest.mark.parametrize("said", SAID)
def test_a_stranger_at_the_meeting_point(bystander: Service, peers: Peers, said: str) -> None:
    data, stays = SAID[said]
    with stranger(data, stays=stays) as port:
        everybody = start_members(peers, f"127.0.0.1:{port}", {})
        assert meet(everybody, SHORT_MS) == ["LLM_TIMEOUT"] * len(MEMBERS)
        assert pull(bystander) is None
    assert [peer.call("link_states") for peer in everybody] == [{}] * len(MEMBERS)
    # The stranger has gone, and they meet at the very same place.
    all_meet(everybody)
    assert bystander.link_states() == {PEER: "linked"}
    assert pull(bystander) is None


class Vandal:
    """Writes into the meeting of others whatever it likes, as soon as there is one."""

    def __init__(self, port: int, say: Callable[[Vandal], None]) -> None:
        self.port, self.say = port, say
        # Only for its ways of naming and sealing; it has no secret.
        seats = [Member(rank, cluster_id) for cluster_id, rank in MEMBERS.items()]
        nothing: Any = lambda *_: None  # noqa: E731
        self.knows = Rendezvous(
            NAME, seats, 0, ("127.0.0.1", port), Deadline.after_ms(0), nothing, nothing, nothing,
            MessageAuthenticator(None),
        )  # fmt: skip
        self.done = threading.Event()
        self.spoke = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        from torch.distributed import TCPStore

        while not self.done.is_set():
            # A store that has nobody to connect to takes its time to say so.
            with suppress(RuntimeError, OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                self.store = TCPStore(
                    "127.0.0.1", self.port, wait_for_workers=False, timeout=timedelta(seconds=1)
                )
                while not self.done.is_set():
                    self.say(self)
                    self.spoke = True
                    time.sleep(0.002)
            time.sleep(0.02)

    def write(self, what: str, value: bytes, *, sealed: bool = True, token: str = "") -> None:
        text = self.knows._sealed(what, value, token).hex() if sealed else value
        self.store.set(self.knows._key(what), text)

    def close(self) -> None:
        self.done.set()
        self.thread.join()


def garbage(vandal: Vandal) -> None:
    for what in ("members", "token", "seat/1", "seat/2", "card/0", "card/1", "card/2"):
        vandal.write(what, b"\xff\xfe no hex", sealed=False)


def cards_of_no_address(vandal: Vandal) -> None:
    write_cards(vandal, [("no address", 1), ("::::", 1), ("localhost", 1)])


def cards_of_no_port(vandal: Vandal) -> None:
    write_cards(vandal, [("127.0.0.1", -1), ("127.0.0.1", 10**9), ("127.0.0.1", 0)])


def write_cards(vandal: Vandal, addresses: list[tuple[str, int]]) -> None:
    for seat, (host, port) in enumerate(addresses):
        card = msgspec.msgpack.encode([list(MEMBERS)[seat], "life", host, port])
        vandal.write(f"card/{seat}", card)


@pytest.mark.parametrize(
    ("say", "secret"),
    [(garbage, False), (garbage, True), (cards_of_no_address, False), (cards_of_no_port, False)],
)
def test_a_vandal_in_the_meeting(
    bystander: Service, peers: Peers, say: Callable[[Vandal], None], secret: bool
) -> None:
    port = free_port()
    options = {"llm.LinkSecret": "correct horse battery staple"} if secret else {}
    everybody = start_members(peers, f"127.0.0.1:{port}", options)
    vandal = Vandal(port, say)
    try:
        for peer in everybody[:-1]:
            peer.begin("try_link_by_table", NAME, MEMBERS, TABLE, 2 * SHORT_MS)
        # The last one comes when there is something to read.
        assert eventually(lambda: vandal.spoke)
        outcomes = meet(everybody[-1:], SHORT_MS)
        outcomes += [peer.answer() for peer in everybody[:-1]]
    finally:
        vandal.close()
    # Between two times of writing they may have met.
    typed = {"", "LLM_TIMEOUT", "LLM_LINK_FAILED", "LLM_PARAM_INVALID"}
    assert set(outcomes) <= typed, outcomes
    assert pull(bystander) is None
    for peer in everybody:
        assert "error in the link thread" not in peer.call("noted")[1]
        peer.call("give_up_tables")
    all_meet(everybody)
    assert bystander.link_states() == {PEER: "linked"}
