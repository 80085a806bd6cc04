# SPDX-License-Identifier: Apache-2.0
"""Strangers who choose the name under which ZeroMQ would file the next connection.

A ROUTER names connections by a zero byte and a counter, does not refuse peers who call themselves
so, and aborts the process when its next number is taken (libzmq 4.3.5, socket_base.cpp).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq

from llm_datadist_torch.links import messages
from llm_datadist_torch.links.inbound import Inbound
from llm_datadist_torch.links.messages import Envelope, encode
from tests.faults.helpers import OK, PEER, Peers, pull, start_here, start_peer
from tests.peers import Peer, Service, spawn

SECRET = {"options": {"llm.LinkSecret": "correct horse battery staple"}}
FIRST = 0x6B8B4567
"""What rand() gives first in a process that has not seeded it."""


class Victim(Service):
    """Knows by which name ZeroMQ filed a connection last."""

    def watch(self) -> None:
        receive = Inbound.receive

        def noted(inbound: Inbound, socket: zmq.Socket[bytes]) -> tuple[bytes, list[bytes]]:
            identity, frames = receive(inbound, socket)
            self.last = identity
            return identity, frames

        Inbound.receive = noted  # type: ignore[method-assign]

    def name(self) -> bytes:
        return self.last


@pytest.fixture
def victim() -> Iterator[Peer]:
    peer = spawn(Victim)
    yield peer
    peer.close()


@contextmanager
def called(port: int, first: int, count: int, wait_ms: int = 20_000) -> Iterator[int]:
    """So many strangers with names in a row; yields how many got an answer."""
    with zmq.Context() as context:
        poller, sockets = zmq.Poller(), []
        for number in range(first, first + count):
            dealer = context.socket(zmq.DEALER)
            dealer.linger, dealer.reconnect_ivl = 0, -1
            dealer.setsockopt(zmq.ROUTING_ID, b"\0" + (number % 2**32).to_bytes(4, "big"))
            dealer.connect(f"tcp://127.0.0.1:{port}")
            dealer.send(encode(Envelope(1, False, messages.Unlink())))
            poller.register(dealer, zmq.POLLIN)
            sockets.append(dealer)
        answered = set()
        while len(answered) < count and (ready := poller.poll(wait_ms)):
            answered.update(dealer for dealer, _ in ready)
            for dealer, _ in ready:
                poller.unregister(dealer)
        try:
            yield len(answered)
        finally:
            for dealer in sockets:
                dealer.close()


def test_guessing(here: Service, victim: Peer, peers: Peers) -> None:
    """The counter does not begin where it does in every process."""
    port = start_peer(victim, 7)
    start_here(here)
    with called(port, FIRST, 64) as answered:
        # Not refused: ZeroMQ knows no such thing.
        assert answered == 64
        assert here.link(PEER, port) == OK
        newcomer = peers()
        newcomer.ask("start", 3)
        assert newcomer.ask("link", PEER, port) == OK
        assert pull(here) is None


def test_who_does_not_know_the_secret_gets_no_name(here: Service, victim: Peer) -> None:
    """Not even one who knows which number is next."""
    victim.ask("watch")
    port = start_peer(victim, 7, **SECRET)
    start_here(here, **SECRET)
    assert here.link(PEER, port) == OK
    name = victim.ask("name")
    assert name[0] == 0
    assert len(name) == 5
    with called(port, int.from_bytes(name[1:], "big") + 1, 8, 1000) as answered:
        assert answered == 0
        newcomer = Service()
        try:
            newcomer.start(3, **SECRET)
            assert newcomer.link(PEER, port) == OK
        finally:
            newcomer.finish()
    assert pull(here) is None


SCRIPT = """
import ctypes, zmq
from llm_datadist_torch.links.sockets import new_context, new_listener
libc = ctypes.CDLL(None)
libc.srand(1)
context = new_context()
listener = new_listener(context, None)
port = listener.bind_to_random_port("tcp://127.0.0.1")
dealer = context.socket(zmq.DEALER)
dealer.connect(f"tcp://127.0.0.1:{port}")
dealer.send(b"")
print(listener.recv_multipart()[0].hex(), libc.rand())
context.destroy(0)
"""


def test_the_numbers_can_not_be_foreseen_and_rand_is_as_it_was() -> None:
    seen = {
        tuple(subprocess.check_output([sys.executable, "-c", SCRIPT], text=True).split())
        for _ in range(2)
    }
    assert len({name for name, _ in seen}) == 2
    assert {rand for _, rand in seen} == {str(FIRST)}
