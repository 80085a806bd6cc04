# SPDX-License-Identifier: Apache-2.0
"""NIXL over TCP between processes: bytes, and what is left of them when something ends early."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey
from tests.faults.conftest import here, peers
from tests.faults.helpers import ME, NYL, OK, PEER, THEIRS, TIMEOUT, Peers
from tests.faults.test_network import network
from tests.peers import Peer, Ref, Service, eventually
from tests.transfer.remote import messages

__all__ = ["here", "network", "peers"]

pytestmark = pytest.mark.needs_nixl

NIXL = {"llm.Transport": "nixl"}
BLOCKS = list(range(8))
BLOCK_BYTES = 2 << 20
"""32 MiB in two tensors: tens of milliseconds."""
QUIET_S = 0.3
"""Long enough for what is under way to land."""


@pytest.fixture(autouse=True)
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between hosts; else UCX takes shared memory. Processes that start later have it too."""
    monkeypatch.setenv("UCX_TLS", "tcp")


def start(peer: Any, cluster: int, listen: str = "127.0.0.1:0") -> int:
    return peer("start", cluster, options=NIXL, listen=listen, timeout_ms=60_000)


def offer_cache(peer: Peer, colour: int) -> None:
    peer.call("allocate", "theirs", 2, len(BLOCKS), BLOCK_BYTES, paged=True, keys=THEIRS)
    peer.call("paint", "theirs", colour)


def linked(here: Service, peers: Peers, colour: int = 5) -> Peer:
    peer = peers()
    port = start(peer.call, PEER)
    offer_cache(peer, colour)
    if here.datadist is None:
        start(lambda _, *args, **more: here.start(*args, **more), ME)
        here.allocate("mine", 2, len(BLOCKS), BLOCK_BYTES, paged=True)
    assert here.link(PEER, port) == OK
    return peer


def move(service: Any, operation: str, **further: Any) -> Any:
    return service.attempt(operation, THEIRS, Ref("mine"), BLOCKS, BLOCKS, **further)


def stays(service: Callable[..., Any], name: str, colour: int) -> None:
    """Paint, and see that nobody else does."""
    service("paint", name, colour)
    time.sleep(QUIET_S)
    assert service("all_are", name, colour)


def call(here: Service) -> Callable[..., Any]:
    return lambda name, *args: getattr(here, name)(*args)


def test_what_a_link_says(here: Service, peers: Peers) -> None:
    linked(here, peers)
    assert here.transports(PEER) == ("nixl", None)
    (info,) = here.dd.links()
    assert any("UCX" in str(choice) for choice in info.choices)


def test_a_known_cache_takes_one_message(
    here: Service, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = peers()
    port = peer.call("start", PEER, options=NIXL, remote=True)
    offer_cache(peer, 5)
    here.start(ME, options=NIXL, remote=True)
    here.allocate("mine", 2, len(BLOCKS), BLOCK_BYTES, paged=True)
    assert here.link(PEER, port) == OK
    known = ["Call"]
    with messages(monkeypatch) as said:
        for colour in (6, 7):
            peer.call("paint", "theirs", colour)
            assert move(here, "pull_blocks") is None
            assert here.all_are("mine", colour)
        assert said == ["Resolve", "Call", "Release", *known]
        channel = here.instance.links.find(PEER).channel._channels["nixl"]
        agent = channel._incoming._agent
        peer.call("drop", "theirs")
        offer_cache(peer, 8)
        said.clear()
        assert move(here, "pull_blocks") is None
        assert said == [*known, "Resolve", "Call", "Release"]
    assert here.all_are("mine", 8)
    # A claim that is refused costs a message, and not the agent.
    assert channel._incoming._agent is agent
    peer.call("drop", "theirs")
    assert move(here, "pull_blocks").status == "LLM_KV_CACHE_NOT_EXIST"
    assert here.all_are("mine", 8)


def test_a_pull_that_times_out_writes_no_more(here: Service, peers: Peers) -> None:
    peer = linked(here, peers)
    assert move(here, "pull_blocks") is None
    timeouts = 0
    for after_ms in (1, 10, 30):
        peer.call("paint", "theirs", 7)
        failure = move(here, "pull_blocks", timeout=after_ms)
        if failure is not None:
            assert failure.status == TIMEOUT
            timeouts += 1
            stays(call(here), "mine", 3)
        # The link stays usable.
        assert move(here, "pull_blocks") is None
        assert here.all_are("mine", 7)
    assert timeouts
    assert eventually(lambda: not peer.call("counters")["leases"])


def test_a_push_that_times_out_writes_no_more(here: Service, peers: Peers) -> None:
    peer = linked(here, peers)
    here.paint("mine", 4)
    assert move(here, "push_blocks") is None
    assert peer.call("all_are", "theirs", 4)
    timeouts = 0
    for after_ms in (1, 10, 30):
        here.paint("mine", 6)
        failure = move(here, "push_blocks", timeout=after_ms)
        if failure is not None:
            assert failure.status == TIMEOUT
            timeouts += 1
            # The owner keeps the lease until nothing is on its way any more.
            assert eventually(lambda: not peer.call("counters")["leases"])
            stays(peer.call, "theirs", 3)
        assert move(here, "push_blocks") is None
        assert peer.call("all_are", "theirs", 6)
    assert timeouts


def test_a_stopped_peer_writes_no_more_when_it_wakes(here: Service, peers: Peers) -> None:
    peer = linked(here, peers)
    assert move(here, "pull_blocks") is None
    peer.call("paint", "theirs", 7)
    failures: list[Any] = []
    puller = threading.Thread(
        target=lambda: failures.append(move(here, "pull_blocks", timeout=1000))
    )
    puller.start()
    time.sleep(0.01)
    with peer.stopped():
        puller.join()
        here.paint("mine", 3)
    time.sleep(QUIET_S)
    if failures[0] is not None:
        assert failures[0].status == TIMEOUT
        assert here.all_are("mine", 3)
    assert eventually(lambda: move(here, "pull_blocks") is None)
    assert here.all_are("mine", 7)


@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
def test_the_peer_dies(here: Service, peers: Peers, operation: str) -> None:
    """A typed error, soon; and the next peer of the name is served."""
    for after_s in (0.005, 0.05):
        peer = linked(here, peers)
        assert move(here, operation) is None
        killer = threading.Timer(after_s, peer.kill)
        killer.start()
        started = time.monotonic()
        while (failure := move(here, operation)) is None:
            assert time.monotonic() - started < 30
        killer.join()
        assert failure.status == NYL
        assert time.monotonic() - started < 20
        stays(call(here), "mine", 3)
        assert eventually(lambda: here.link_states() == {PEER: "lost"})
        assert not here.counters()["leases"]


@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
def test_who_works_on_our_cache_dies(here: Service, peers: Peers, operation: str) -> None:
    """We live, and what it used is free again."""
    ours = BlocksCacheKey(ME, 0)
    port = here.start(ME, options=NIXL, timeout_ms=60_000)
    for number, after_s in enumerate((0.0, 0.03, 0.1), start=PEER):
        here.allocate("ours", 2, len(BLOCKS), BLOCK_BYTES, paged=True, keys=ours)
        here.paint("ours", number)
        peer = peers()
        start(peer.call, number)
        peer.call("allocate", "mine", 2, len(BLOCKS), BLOCK_BYTES, paged=True)
        assert peer.call("link", ME, port) == OK
        assert peer.call("attempt", operation, ours, Ref("mine"), BLOCKS, BLOCKS) is None
        peer.begin("hammer", operation, ours, Ref("mine"), BLOCKS, BLOCKS)
        time.sleep(after_s)
        peer.kill()
        assert eventually(lambda: not here.counters()["leases"])
        stays(call(here), "ours", 1)
        here.drop("ours")


def test_memory_comes_and_goes(here: Service, peers: Peers) -> None:
    """Stale registrations are never used: each time other memory, or the same one anew."""
    peer = linked(here, peers)
    for colour in range(1, 5):
        peer.call("drop", "theirs")
        here.drop("mine")
        if colour % 2:
            offer_cache(peer, colour)
            here.allocate("mine", 2, len(BLOCKS), BLOCK_BYTES, paged=True)
        else:
            blocks = (2, len(BLOCKS), BLOCK_BYTES)
            peer.call("make", "tensors", "theirs", *blocks, paged=True, keys=THEIRS)
            peer.call("paint", "theirs", colour)
            here.make("tensors", "mine", *blocks, paged=True)
        assert move(here, "pull_blocks") is None
        assert here.all_are("mine", colour)
        here.paint("mine", colour + 100)
        assert move(here, "push_blocks") is None
        assert peer.call("all_are", "theirs", colour + 100)


@pytest.mark.parametrize("first", ["theirs", "part"])
def test_a_cache_inside_the_memory_of_another(here: Service, peers: Peers, first: str) -> None:
    """Both stay reachable, also when either is unregistered."""
    peer = linked(here, peers)
    peer.call("drop", "theirs")
    count, whole = len(BLOCKS), BlocksCacheKey(PEER, 9)
    peer.call("make", "tensors", "theirs", 2, 3 * count, BLOCK_BYTES, paged=True, keys=whole)
    peer.call("register_part", "theirs", "part", count, 2 * count, THEIRS)
    inside = [count + block for block in BLOCKS]
    moves: dict[str, tuple[BlocksCacheKey, list[int]]] = {
        "theirs": (whole, inside), "part": (THEIRS, BLOCKS)
    }  # fmt: skip

    def all_move(colour: int) -> None:
        for name, (key, blocks) in moves.items():
            peer.call("paint", name, colour)
            assert here.attempt("pull_blocks", key, Ref("mine"), blocks, BLOCKS) is None
            assert here.all_are("mine", colour)
            here.paint("mine", colour + 100)
            assert here.attempt("push_blocks", key, Ref("mine"), BLOCKS, blocks) is None
            assert peer.call("rows", name)[0][blocks[0]] == colour + 100

    all_move(1)
    del moves[first]
    peer.call("drop", first)
    all_move(2)
    assert here.transports(PEER)[0] == "nixl"


@pytest.mark.needs_netns
def test_between_hosts(peers: Peers, network: tuple[str, str, Callable[[str], None]]) -> None:
    """Two hosts by network namespaces: bytes go through the veth pair, not through memory."""
    space, address, set_link = network
    near, far = peers(), peers()
    # Of all our interfaces only this one leads there, which UCX can't know. Only a process that has
    # not loaded UCX yet takes it.
    near.call("set_environment", {"UCX_NET_DEVICES": f"va{space[3:]}", "UCX_TLS": "tcp"})
    far.call("set_environment", {"UCX_NET_DEVICES": f"vb{space[3:]}", "UCX_TLS": "tcp"})
    far.call("enter_network", space)
    port = start(far.call, PEER, listen=f"{address}:0")
    offer_cache(far, 5)
    start(near.call, ME)
    near.call("allocate", "mine", 2, len(BLOCKS), BLOCK_BYTES, paged=True)
    assert near.call("link", PEER, port, ip=address) == OK
    near.call("note_paths")

    def move_near(operation: str, **further: Any) -> Any:
        return near.call("attempt", operation, THEIRS, Ref("mine"), BLOCKS, BLOCKS, **further)

    assert move_near("pull_blocks") is None
    assert near.call("all_are", "mine", 5)
    near.call("paint", "mine", 6)
    assert move_near("push_blocks") is None
    assert far.call("all_are", "theirs", 6)
    assert near.call("noted")[0] == ["nixl", "nixl"]
    set_link("down")
    failure = move_near("pull_blocks", timeout=1000)
    assert failure.status in (NYL, TIMEOUT)
    set_link("up")
    assert eventually(lambda: move_near("pull_blocks", timeout=20_000) is None)
    assert near.call("all_are", "mine", 6)
