# SPDX-License-Identifier: Apache-2.0
"""Crowds of strangers: links go on working, and nothing grows without bounds."""

from __future__ import annotations

import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from llm_datadist_torch.net import strangers
from llm_datadist_torch.serving import messages
from llm_datadist_torch.serving.messages import Envelope, encode
from tests.faults.helpers import ME, OK, PEER, Peers, pull, start_here, start_peer
from tests.peers import Peer, Service, eventually, spawn
from tests.security import attackers
from tests.wire import GREETING, framed, stranger

MIB = 1 << 20
SECRET = {"options": {"llm.LinkSecret": "correct horse battery staple"}}


class Victim(Service):
    """An instance whose process may open few descriptors."""

    def limit(self, descriptors: int) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))

    def patience(self, seconds: float) -> None:
        strangers.STRANGER_S = seconds


@pytest.fixture
def victim() -> Iterator[Peer]:
    peer = spawn(Victim)
    yield peer
    peer.close()


@contextmanager
def crowd(port: int, count: int, wave: int, said: str) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable,
        "-m",
        "tests.security.attackers",
        str(port),
        str(count),
        str(wave),
        said,
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        yield it
        assert it.stdin is not None
        it.stdin.close()
        assert it.wait(30) == 0


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) << 10


@pytest.mark.parametrize("secret", [SECRET, {}], ids=["secret", "open"])
def test_ten_thousand_connections(here: Service, victim: Peer, peers: Peers, secret: dict) -> None:
    """While they come, a link transfers, a new one is made, and descriptors stay few."""
    victim.call("limit", 1024)
    port = start_peer(victim, 7, **secret)
    start_here(here, **secret)
    assert here.link(PEER, port) == OK
    assert pull(here) is None
    before = resident(victim.pid)
    newcomer = peers()
    newcomer.call("start", 3, **secret)
    pulled, most = 0, 0
    with crowd(port, 10_000, 2500, "half a greeting") as attack:
        assert attack.stdout is not None
        end = time.monotonic() + 60
        while not select.select([attack.stdout], [], [], 0)[0] and time.monotonic() < end:
            here.paint("mine", 0)
            assert pull(here) is None
            assert here.colours("mine") == [7]
            pulled += 1
            most = max(most, descriptors(victim.pid))
        # TCP drops what comes too fast; those who are dropped try again twice.
        assert int(attack.stdout.readline()) > 5000
        assert pulled > 3
        assert newcomer.call("link", PEER, port) == OK
        assert eventually(lambda: descriptors(victim.pid) < 400)
    assert most <= 1024
    assert resident(victim.pid) < before + 64 * MIB
    assert eventually(lambda: descriptors(victim.pid) < 100)
    assert here.link_states() == {PEER: "linked"}


@pytest.mark.parametrize("said", attackers.SAID)
def test_who_never_gets_on(here: Service, victim: Peer, said: str) -> None:
    victim.call("patience", 1.0)
    port = start_peer(victim, 7)
    start_here(here)
    assert here.link(PEER, port) == OK
    before = descriptors(victim.pid)
    with crowd(port, 20, 20, said) as attack:
        assert attack.stdout is not None
        assert attack.stdout.readline() == "20\n"
        # They are still there, and are turned away.
        assert eventually(lambda: descriptors(victim.pid) <= before)
    assert pull(here) is None
    assert here.colours("mine") == [7]
    assert here.link_states() == {PEER: "linked"}


def send_much(connection: socket.socket, data: bytes) -> None:
    for _ in range((1 << 30) // len(data)):
        connection.sendall(data)


def assert_ended(connection: socket.socket) -> None:
    """The other side has closed it; what it said before is read first."""
    while connection.recv(1 << 16):
        pass


def test_a_message_without_end(here: Service, victim: Peer) -> None:
    """A message is kept until all of it has come: this one's data never does."""
    # Not because of the time that it takes.
    victim.call("patience", 3600.0)
    port = start_peer(victim, 7)
    start_here(here)
    assert here.link(PEER, port) == OK
    before = resident(victim.pid)
    # Whole ones that are far too many, and one that is far too long.
    part = framed(encode(Envelope(0, True, messages.Done()))) * 1000
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(GREETING)
        with pytest.raises((ConnectionError, TimeoutError)) as caught:
            send_much(connection, part)
        # The kernel resets a connection that is over with the next bytes that come; but where
        # there was no room for them when it ended, none ever do.
        if caught.type is TimeoutError:
            assert_ended(connection)
    assert resident(victim.pid) < before + 256 * MIB
    assert pull(here) is None


def test_garbage_is_answered_by_the_end_of_the_connection(here: Service, victim: Peer) -> None:
    port = start_peer(victim, 7)
    start_here(here)
    assert here.link(PEER, port) == OK
    with stranger(port) as dealer:
        with suppress(ConnectionError):
            for _ in range(100):
                dealer.send(b"\xc1")
        assert dealer.ended()
    assert pull(here) is None


def test_one_connection_is_one_link(victim: Peer) -> None:
    port = start_peer(victim, 7)
    offers = {"local": b"\x94\xa1x\x01\x01\x01"}
    with stranger(port) as dealer:
        answers = []
        for cluster_id in (11, 12, 13):
            hello = messages.Hello(cluster_id, PEER, "life", False, offers)
            answers.append(dealer.request(hello))
        assert [type(answer).__name__ for answer in answers] == ["Welcome", "Refused", "Refused"]
        assert victim.call("link_states") == {11: "linked"}
        answers = set()
        for _ in range(1100):
            resolve = messages.Resolve("blocks", 0, 0, True, False)
            answers.add(type(dealer.request(resolve)).__name__)
        assert victim.call("counters")["grants"] == 1024
        assert "Refused" in answers
    assert eventually(lambda: victim.call("counters")["leases"] == 0)
    assert ME not in victim.call("link_states")
