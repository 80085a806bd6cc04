# SPDX-License-Identifier: Apache-2.0
"""A network that goes down and comes back, and peers that flood it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import torch

from llm_datadist_torch import BlocksCacheKey
from llm_datadist_torch.serving import messages
from llm_datadist_torch.serving.messages import Envelope, encode
from llm_datadist_torch.transports.local.host import HostIdentity
from tests.faults.helpers import (
    ME,
    NYL,
    OK,
    PEER,
    TIMEOUT,
    Peers,
    events_of,
    kinds,
    pull,
    start_here,
    start_peer,
)
from tests.peers import Service, eventually
from tests.wire import framed, stranger


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[tuple[str, str, Callable[[str], None]]]:
    """A namespace, an address in it that we reach, and what sets the connection up or down."""
    space, ours, theirs = (f"{name}{os.getpid() % 100000}" for name in ("far", "va", "vb"))
    net = f"10.231.{os.getpid() % 250}"
    ip("netns", "add", space)
    try:
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", space)
        ip("addr", "add", f"{net}.1/24", "dev", ours)
        ip("link", "set", ours, "up")
        for args in (
            ("addr", "add", f"{net}.2/24", "dev", theirs),
            ("link", "set", theirs, "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", space, *args)
        yield space, f"{net}.2", lambda state: ip("link", "set", ours, state)
    finally:
        ip("netns", "del", space)


@pytest.mark.needs_netns
def test_the_network_goes_down_and_comes_back(
    here: Service,
    peers: Peers,
    network: tuple[str, str, Callable[[str], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space, address, set_link = network
    peer, near = peers(), peers()
    peer.call("enter_network", space)
    here.watch_hosts(monkeypatch)
    peer.call("watch_hosts")
    port = start_peer(peer, 5, listen=f"{address}:0")
    start_here(here, timeout_ms=2000)
    assert here.link(PEER, port, ip=address) == OK
    near_port = near.call("start", 3)
    near.call("allocate", "near", 2, 4, 64, paged=True, keys=BlocksCacheKey(3, 0))
    near.call("paint", "near", 7)
    assert here.link(3, near_port) == OK
    here.allocate("other", 2, 4, 64, paged=True)
    seen = events_of(here)
    for colour in (5, 6):
        peer.call("paint", "theirs", colour)
        assert pull(here) is None
        assert here.colours("mine") == [colour]
        set_link("down")
        # A call that waits for an answer when the network goes, and one that begins afterwards.
        failures = [pull(here, timeout=20_000), pull(here, timeout=300)]
        assert failures[0].status == NYL
        assert failures[1].status in (NYL, TIMEOUT)
        # Other peers are served as before.
        ids = [0, 1, 2, 3]
        other = here.held["other"].cache
        here.manager.pull_blocks(BlocksCacheKey(3, 0), other, ids, ids)
        assert here.colours("other") == [7]
        assert eventually(lambda: peer.call("link_states") == {ME: "lost"})
        set_link("up")
        assert eventually(lambda: pull(here) is None)
        assert here.colours("mine") == [colour]
    expected = ["lost", "relinked"] * 2
    assert kinds(seen, 4) == expected
    assert eventually(lambda: not any(peer.call("counters")[name] for name in ("leases", "grants")))


HOLD_CONNECTIONS = """
import socket, sys
held = [socket.create_connection((sys.argv[1], int(sys.argv[2]))) for _ in range(2)]
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.needs_netns
def test_no_local_port_is_left(
    here: Service, peers: Peers, network: tuple[str, str, Callable[[str], None]]
) -> None:
    space, theirs, _ = network
    ours = f"{theirs.rpartition('.')[0]}.1"
    peer = peers()
    peer.call("enter_network", space)
    start_peer(peer, 5, listen=f"{theirs}:0")
    port = here.start(ME, listen=f"{ours}:0")
    inside = ["ip", "netns", "exec", space]
    two_ports = "echo 61000 61001 >/proc/sys/net/ipv4/ip_local_port_range"
    subprocess.run([*inside, "sh", "-c", two_ports], check=True)
    holder = subprocess.Popen(
        [*inside, sys.executable, "-c", HOLD_CONNECTIONS, ours, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        peer.call("note_paths")
        assert peer.call("link", ME, port, ip=ours)[1] == ["LLM_LINK_FAILED"]
        holder.kill()
    _, warnings = peer.call("noted")
    assert any("net.ipv4.ip_local_port_range" in text for text in warnings), warnings


def test_who_does_not_read_gets_no_more_answers(here: Service, peers: Peers) -> None:
    """A linked peer asks for 4 GiB and reads none of it: that costs this process little memory."""
    size = 1 << 20
    port = here.start(ME)
    here.allocate("mine", 1, 4, size, paged=True, keys=BlocksCacheKey(ME, 0))
    before = resident()
    with stranger(port) as dealer:
        offer = {"local": msgspec.msgpack.encode(HostIdentity("elsewhere", 1, 1, 1))}
        hello = messages.Hello(PEER, ME, "life", False, offer)
        assert isinstance(dealer.request(hello), messages.Welcome)
        view = dealer.request(messages.Resolve("blocks", 0, 0, True, False))
        assert isinstance(view, messages.CacheView)
        address = int.from_bytes(view.addrs, "little")
        spans = torch.tensor([[address, size]]).numpy().tobytes()
        read = framed(encode(Envelope(3, False, messages.ReadBytes(view.lease_id, spans))))
        asked = threading.Thread(target=ask_for_ever, args=(dealer.sock, read * 64), daemon=True)
        asked.start()
        peer = peers()
        peer.call("start", 3)
        assert peer.call("link", ME, port) == OK
        time.sleep(1.0)
        assert resident() - before < 256 << 20
        # It is there, and what it holds is kept for it.
        assert here.link_states() == {PEER: "linked", 3: "linked"}
        assert here.counters()["leases"] == 1
        # Ends the thread that asks, too.
        dealer.sock.shutdown(socket.SHUT_RDWR)
        asked.join(10)
    assert eventually(lambda: here.counters()["leases"] == 0)


def ask_for_ever(sock: socket.socket, said: bytes) -> None:
    with suppress(OSError):
        for _ in range(64):
            sock.sendall(said)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
