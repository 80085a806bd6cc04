# SPDX-License-Identifier: Apache-2.0
"""Strangers where members of a rank table meet: typed errors in time, and nobody else suffers."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest

from llm_datadist_torch import LLMStatusCode
from llm_datadist_torch.links.communicating import RENDEZVOUS_VARIABLE
from llm_datadist_torch.serving import messages
from llm_datadist_torch.serving.messages import Envelope
from tests.faults.helpers import OK, PEER, Peers, pull, start_here, start_peer
from tests.peers import Peer, Service, eventually
from tests.transfer.helpers import free_port
from tests.transfer.tables import TABLE, WAIT_MS, members
from tests.wire import GREETING, Listener, Speaker
from tests.wire import stranger as stranger_at

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
        first, *others = meet(everybody, SHORT_MS)
        assert first == "LLM_TIMEOUT"
        # Who leaves at once may have another secret.
        assert set(others) <= {"LLM_TIMEOUT", "LLM_LINK_FAILED"}
        assert pull(bystander) is None
    assert [peer.call("link_states") for peer in everybody] == [{}] * len(MEMBERS)
    # The stranger has gone, and they meet at the very same place.
    all_meet(everybody)
    assert bystander.link_states() == {PEER: "linked"}
    assert pull(bystander) is None


class Vandal:
    """Comes to the meeting of others again and again, and says whatever it likes."""

    def __init__(self, port: int, say: Callable[[Speaker], None]) -> None:
        self.port, self.say = port, say
        self.done = threading.Event()
        self.spoke = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.done.is_set():
            with suppress(OSError), stranger_at(self.port) as speaker:
                # Before there is a meeting, and where there is a secret, nobody listens to it.
                self.spoke = True
                self.say(speaker)
            time.sleep(0.002)

    def close(self) -> None:
        self.done.set()
        self.thread.join()


SEATS = [(rank, cluster_id) for cluster_id, rank in MEMBERS.items()]


def join(speaker: Speaker, place: int) -> messages.Message:
    name = hashlib.sha256(NAME.encode()).hexdigest()
    return speaker.request(messages.JoinMeeting(name, SEATS, place))


def enter(speaker: Speaker, *info: Any) -> None:
    """As EnterMeeting, also with what is none."""
    speaker.send(msgspec.msgpack.encode([7, False, ["EnterMeeting", info]]))


def garbage(speaker: Speaker) -> None:
    for seed in range(16):
        speaker.send(random.Random(seed).randbytes(100))
    speaker.send_raw(b"\xff" * 4096)


def members_of_no_address(speaker: Speaker) -> None:
    for place, host in ((1, "no address"), (2, "::::")):
        with stranger_at(speaker.sock.getpeername()[1]) as another:
            join(another, place)
            enter(another, list(MEMBERS)[place], "life", host, 1)
            time.sleep(0.05)


def members_of_no_port(speaker: Speaker) -> None:
    join(speaker, 1)
    for port in (-1, 0, 10**9, "1"):
        enter(speaker, 12, "life", "127.0.0.1", port)
    time.sleep(0.05)


def other_members(speaker: Speaker) -> None:
    for place in (-1, 0, 1, 3, 2**62):
        join(speaker, place)
    enter(speaker, 13, "life", "127.0.0.1", 1)
    join(speaker, 2)
    time.sleep(0.05)


@pytest.mark.parametrize(
    ("say", "secret"),
    [
        (garbage, False),
        (garbage, True),
        (members_of_no_address, False),
        (members_of_no_port, False),
        (other_members, False),
    ],
)
def test_a_vandal_in_the_meeting(
    bystander: Service, peers: Peers, say: Callable[[Speaker], None], secret: bool
) -> None:
    port = free_port()
    options = {"llm.LinkSecret": "correct horse battery staple"} if secret else {}
    everybody = start_members(peers, f"127.0.0.1:{port}", options)
    vandal = Vandal(port, say)
    try:
        for peer in everybody[:-1]:
            peer.begin("try_link_by_table", NAME, MEMBERS, TABLE, 2 * SHORT_MS)
        # The last one comes when somebody has been there before.
        assert secret or eventually(lambda: vandal.spoke)
        outcomes = meet(everybody[-1:], SHORT_MS)
        outcomes += [peer.answer() for peer in everybody[:-1]]
    finally:
        vandal.close()
    # Between two of its visits they may have met.
    typed = {"", "LLM_TIMEOUT", "LLM_LINK_FAILED", "LLM_PARAM_INVALID"}
    assert set(outcomes) <= typed, outcomes
    assert not secret or outcomes == [""] * len(MEMBERS)
    assert pull(bystander) is None
    for peer in everybody:
        assert "error in the link thread" not in peer.call("noted")[1]
        peer.call("give_up_tables")
    all_meet(everybody)
    assert bystander.link_states() == {PEER: "linked"}


def test_a_seat_is_free_again_when_its_connection_ends(peers: Peers) -> None:
    port = free_port()
    everybody = start_members(peers, f"127.0.0.1:{port}", {})
    for peer in everybody[:-1]:
        peer.begin("try_link_by_table", NAME, MEMBERS, TABLE, WAIT_MS)

    def sit_down() -> bool:
        try:
            speaker = Speaker.dial(port)
        except OSError:
            return False
        if isinstance(join(speaker, 2), messages.MeetingToken):
            sitting.append(speaker)
            return True
        speaker.close()
        return False

    sitting: list[Speaker] = []
    assert eventually(sit_down)
    # Nobody takes the place of who has come.
    assert meet(everybody[-1:], SHORT_MS) == ["LLM_TIMEOUT"]
    everybody[-1].begin("try_link_by_table", NAME, MEMBERS, TABLE, WAIT_MS)
    sitting[0].close()
    assert [peer.answer() for peer in everybody] == [""] * len(MEMBERS)


def info(place: int, host: str = "127.0.0.1") -> messages.MemberInfo:
    return messages.MemberInfo(list(MEMBERS)[place], "life", host, 1)


LIES = {
    "nothing": (None, None),
    "what it was not asked for": (messages.Done(), messages.Done()),
    "no token": (messages.Answer(b"token"), None),
    "that it is not the one": (messages.Refused(int(LLMStatusCode.LLM_PARAM_INVALID), "no"), None),
    "too few": (messages.MeetingToken("t"), messages.MeetingMembers([info(0)])),
    "others": (
        messages.MeetingToken("t"),
        messages.MeetingMembers([info(0), info(0), info(0)]),
    ),
    "no addresses": (
        messages.MeetingToken("t"),
        messages.MeetingMembers([info(place, "no address") for place in range(3)]),
    ),
    "where nobody is": (
        messages.MeetingToken("t"),
        messages.MeetingMembers([info(place) for place in range(3)]),
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_first_member_that_lies(bystander: Service, peers: Peers, lie: str) -> None:
    on_join, on_enter = LIES[lie]

    def serve(speaker: Speaker) -> None:
        envelope = messages.decode(speaker.receive()[0])
        answer = on_join if isinstance(envelope.body, messages.JoinMeeting) else on_enter
        if answer is not None:
            speaker.send(messages.encode(Envelope(envelope.request_id, True, answer)))

    liar = Listener(serve)
    try:
        everybody = start_members(peers, f"127.0.0.1:{liar.port}", {})
        outcomes = meet(everybody[1:], SHORT_MS)
        assert set(outcomes) <= {"LLM_TIMEOUT", "LLM_LINK_FAILED", "LLM_PARAM_INVALID"}, outcomes
        assert pull(bystander) is None
    finally:
        liar.close()
    assert [peer.call("link_states") for peer in everybody] == [{}] * len(MEMBERS)
    for peer in everybody:
        assert "error in the link thread" not in peer.call("noted")[1]
    all_meet(everybody)
