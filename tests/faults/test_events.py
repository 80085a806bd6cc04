# SPDX-License-Identifier: Apache-2.0
"""What users are told of links."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time

import pytest

from llm_datadist_torch import LinkEvent, LLMDataDist, LLMRole
from tests.faults.helpers import (
    OK,
    PEER,
    Peers,
    events_of,
    kinds,
    pull,
    start_here,
    start_peer,
)
from tests.peers import Peer, Service, eventually


@pytest.fixture
def peer(here: Service, peers: Peers) -> Peer:
    start_here(here)
    return peers()


def test_the_life_of_a_link(here: Service, peer: Peer, peers: Peers) -> None:
    seen = events_of(here)
    before = time.time()
    port = start_peer(peer, 5)
    assert here.link(PEER, port) == OK
    peer.kill()
    assert kinds(seen, 2) == ["linked", "lost"]
    start_peer(peers(), 9, listen=f"127.0.0.1:{port}")
    assert pull(here) is None
    assert here.unlink(PEER, port) == OK
    assert kinds(seen, 4) == ["linked", "lost", "relinked", "unlinked"]
    assert {event.peer for event in seen} == {PEER}
    assert all(event.reason for event in seen)
    assert before <= seen[0].time <= seen[-1].time <= time.time()
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen[0].kind = "lost"  # type: ignore[misc]


def test_unlinking_a_lost_link_is_told_once(here: Service, peer: Peer) -> None:
    seen = events_of(here)
    assert here.link(PEER, start_peer(peer, 5)) == OK
    peer.kill()
    assert kinds(seen, 2) == ["linked", "lost"]
    for _ in range(2):
        assert here.unlink(PEER, None, force=True) == OK
    here.finish()
    assert kinds(seen, 3) == ["linked", "lost", "unlinked"]


def test_the_end_of_the_peer_and_our_own(here: Service, peer: Peer, peers: Peers) -> None:
    seen = events_of(here)
    assert here.link(PEER, start_peer(peer, 5)) == OK
    peer.call("finish")
    assert kinds(seen, 2) == ["linked", "unlinked"]
    assert here.link(PEER, start_peer(peers(), 5)) == OK
    here.finish()
    # Told before finalize returns.
    assert [event.kind for event in seen[2:]] == ["linked", "unlinked"]


def test_removed_callbacks_hear_nothing(here: Service, peer: Peer) -> None:
    seen: list[LinkEvent] = []
    heard = threading.Event()

    def once(event: LinkEvent) -> None:
        seen.append(event)
        handle.remove()
        heard.set()

    handle = here.dd.on_link_event(once)
    rest = events_of(here)
    assert here.link(PEER, start_peer(peer, 5)) == OK
    assert heard.wait(10)
    peer.kill()
    assert kinds(rest, 2) == ["linked", "lost"]
    assert [event.kind for event in seen] == ["linked"]
    handle.remove()


def test_callbacks_that_raise_or_hang(
    here: Service, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    def bad(event: LinkEvent) -> None:
        raise RuntimeError("broken callback")

    here.dd.on_link_event(bad)
    seen = events_of(here)
    port = start_peer(peer, 5)
    with caplog.at_level(logging.ERROR):
        assert here.link(PEER, port) == OK
        assert kinds(seen, 1) == ["linked"]
    assert "broken callback" in caplog.text
    here.dd.on_link_event(lambda event: release.wait(60))
    for _ in range(3):
        assert here.unlink(PEER, port) == OK
        assert here.link(PEER, port) == OK
    # Links go on as ever, and finalize leaves the callback behind.
    assert pull(here) is None
    here.finish()
    release.set()


def test_a_callback_may_use_the_instance(here: Service, peer: Peer, peers: Peers) -> None:
    results: list[object] = []

    def pull_again(event: LinkEvent) -> None:
        if event.kind == "lost":
            results.append(eventually(lambda: pull(here) is None, 30))

    here.dd.on_link_event(pull_again)
    port = start_peer(peer, 5)
    assert here.link(PEER, port) == OK
    peer.kill()
    start_peer(peers(), 9, listen=f"127.0.0.1:{port}")
    assert eventually(lambda: results == [True])
    assert here.colours("mine") == [9]


def test_finalize_in_a_callback(here: Service, peer: Peer) -> None:
    done = threading.Event()

    def end(event: LinkEvent) -> None:
        here.finish()
        done.set()

    here.dd.on_link_event(end)
    here.link(PEER, start_peer(peer, 5))
    assert done.wait(20)


def test_what_is_no_callback(here: Service) -> None:
    with pytest.raises(RuntimeError, match="not initialised"):
        LLMDataDist(LLMRole.MIX, 1).on_link_event(print)
    start_here(here)
    with pytest.raises(TypeError, match="callback must be callable, but is int"):
        here.dd.on_link_event(1)  # type: ignore[arg-type]
