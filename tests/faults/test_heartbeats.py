# SPDX-License-Identifier: Apache-2.0
"""Peers that hang: noticed by heartbeats, and found again when they wake up."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_datadist_torch import BlocksCacheKey
from tests.faults.helpers import (
    BEAT_MS,
    FAST,
    ME,
    NYL,
    OK,
    PEER,
    THEIRS,
    TIMEOUT,
    Peers,
    events_of,
    kinds,
    pull,
    start_here,
    start_peer,
)
from tests.peers import Peer, Ref, Service, settle

POOL = '{"memory_size": 131072, "page_shift": 16}'
"""Room for the two tensors of one cache."""


@pytest.fixture(params=["dialed here", "dialed there"])
def linked(request: pytest.FixtureRequest, here: Service, peers: Peers) -> Peer:
    peer = peers()
    port = start_here(here, options=FAST)
    port_there = start_peer(peer, 5, options=FAST)
    dialed_here = request.param == "dialed here"
    assert (here.link(PEER, port_there) if dialed_here else peer.ask("link", ME, port)) == OK
    return peer


def test_a_stopped_peer_is_lost_and_comes_back(here: Service, linked: Peer) -> None:
    assert pull(here) is None
    seen = events_of(here)
    with linked.stopped():
        # With 20 s to go, it fails as soon as the peer is given up.
        failure = pull(here)
        assert failure.kind == "LLMPeerLostError"
        assert failure.status == NYL
        assert "no sign of life" in failure.text
        assert kinds(seen, 1) == ["lost"]
        (info,) = here.dd.links()
        assert (info.state, info.since >= seen[0].time - 1) == ("lost", True)
    # Whoever dialed does so again, on the next use.
    linked.ask("paint", "theirs", 6)
    if info.dialed:
        assert settle(lambda: pull(here) is None)
    else:
        assert pull(here).status == NYL
        linked.ask("allocate", "room", 2, 4, 64, paged=True)
        here.paint("mine", 1)
        here.allocate("offer", 2, 4, 64, paged=True, keys=BlocksCacheKey(ME, 0))
        ask = ("attempt", "pull_blocks", BlocksCacheKey(ME, 0), Ref("room"), [0], [0])
        assert settle(lambda: linked.ask(*ask) is None)
        assert pull(here) is None
    assert here.colours("mine") == [6]
    assert kinds(seen, 2) == ["lost", "relinked"]
    for service in (here.counters, lambda: linked.ask("counters")):
        assert settle(lambda service=service: not (service()["leases"] or service()["grants"]))


def test_idle_links_stay(here: Service, linked: Peer) -> None:
    seen = events_of(here)
    time.sleep(BEAT_MS * 6 / 1000)
    assert here.link_states() == {PEER: "linked"}
    assert linked.ask("link_states") == {ME: "linked"}
    assert seen == []


def test_without_heartbeats_nothing_is_noticed(here: Service, peers: Peers) -> None:
    peer = peers()
    start_here(here, options={"llm.HeartbeatInterval": "0"})
    # The peer's heartbeats are answered all the same.
    assert here.link(PEER, start_peer(peer, 5, options=FAST)) == OK
    time.sleep(BEAT_MS * 4 / 1000)
    assert peer.ask("link_states") == {ME: "linked"}
    with peer.stopped():
        time.sleep(BEAT_MS * 4 / 1000)
        assert here.link_states() == {PEER: "linked"}
        assert pull(here, timeout=50).status == TIMEOUT
    assert pull(here) is None


def test_all_waiting_calls_fail_when_the_peer_is_given_up(here: Service, linked: Peer) -> None:
    for number in range(4):
        here.allocate(f"m{number}", 2, 4, 64, paged=True)
    here.dd.on_link_event(lambda event: None)
    with ThreadPoolExecutor(4) as pool, linked.stopped():
        work = [pool.submit(pull, here, f"m{number}") for number in range(4)]
        assert settle(lambda: here.link_states() == {PEER: "lost"})
        # The first one waits for the peer, the others for it; one that relinks has nobody to talk
        # to, and the peer's kernel accepts its connection. All end before their 20 s.
        assert work[0].result(10).status == NYL
        assert here.unlink(PEER, None, force=True) == OK
        assert {each.result(25).status for each in work[1:]} <= {NYL, TIMEOUT}


@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
@pytest.mark.parametrize("end", ["it wakes up", "it dies"])
def test_what_a_hung_peer_uses_is_not_freed(
    here: Service, peers: Peers, operation: str, end: str
) -> None:
    """It may wake up and go on reading and writing, before it hears that it was given up."""
    mine = BlocksCacheKey(ME, 0)
    port = here.start(ME, pool=POOL, options=FAST)
    peer = peers()
    peer.ask("start", PEER, options=FAST)
    assert peer.ask("link", ME, port) == OK
    peer.ask("allocate", "theirs", 2, 2, 64, paged=True)
    peer.ask("slow_moves", 0.5)
    here.allocate("mine", 2, 2, 64, paged=True, keys=mine)
    peer.begin("attempt", operation, mine, Ref("theirs"), [0, 1], [0, 1])
    assert settle(lambda: here.counters()["leases"] == 1)
    with peer.stopped():
        assert settle(lambda: here.link_states() == {PEER: "lost"})
        here.drop("mine")
        assert here.counters()["leases"] == 1
        assert here.arena_in_use() > 0
        if end == "it dies":
            peer.kill()
            assert settle(lambda: here.counters()["leases"] == 0)
    if end == "it wakes up":
        failure = peer.answer()
        assert failure is None or failure.status == NYL
    assert settle(lambda: here.counters()["leases"] == 0)
    assert settle(lambda: here.arena_in_use() == 0)


def test_our_own_sleep_says_nothing_about_peers(here: Service, peers: Peers) -> None:
    peer = peers()
    port = start_peer(peer, 5, options={"llm.HeartbeatInterval": "0"})
    sleeper = peers()
    sleeper.ask("start", ME, options=FAST)
    sleeper.ask("allocate", "mine", 2, 4, 64, paged=True)
    assert sleeper.ask("link", PEER, port) == OK
    with sleeper.stopped():
        time.sleep(BEAT_MS * 5 / 1000)
    time.sleep(BEAT_MS / 1000)
    assert sleeper.ask("link_states") == {PEER: "linked"}
    args = ("attempt", "pull_blocks", THEIRS, Ref("mine"), [0], [0])
    assert sleeper.ask(*args) is None
