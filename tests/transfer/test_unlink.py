# SPDX-License-Identifier: Apache-2.0
"""How links end: by one side, by both, in agreement or not (reference API, 11.2 and 6.4)."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llm_datadist_torch.transports.choice import LinkChannel
from tests.peers import Service, eventually
from tests.transfer.helpers import OK, Peers, free_port, only, pull_block


@pytest.mark.parametrize("asker", ["dialer", "listener"])
def test_unlink_ends_both_sides(pair: tuple[Service, Service, int], asker: str) -> None:
    here, other, port = pair
    port_here = here.dd.listen_address[1]
    for _ in range(20):
        assert here.link(2, port) == OK
        assert (here.unlink(2, port) if asker == "dialer" else other.unlink(1, port_here)) == OK
        assert eventually(lambda: here.link_states() == other.link_states() == {})
        assert pull_block(here, 2).status == "LLM_NOT_YET_LINK"
        assert pull_block(other, 1).status == "LLM_NOT_YET_LINK"


def test_unlink_force_is_local(pair: tuple[Service, Service, int]) -> None:
    here, other, port = pair
    assert here.link(2, port) == OK
    assert here.unlink(2, force=True) == OK
    assert here.link_states() == {}
    assert other.unlink(1, force=True) == OK
    assert other.link_states() == {}
    assert here.link(2, port) == OK
    # The listening side alone, too: the other side learns of it with its next call at the latest.
    assert other.unlink(1, force=True) == OK
    assert pull_block(here, 2).status == "LLM_NOT_YET_LINK"
    assert here.link(2, port) == OK
    assert pull_block(here, 2) is None


def test_unlink_not_linked(pair: tuple[Service, Service, int]) -> None:
    here, _, port = pair
    assert here.unlink(2, port) == OK
    assert here.unlink(2, free_port()) == only("LLM_UNLINK_FAILED")
    assert here.unlink(2, force=True) == OK
    assert here.unlink(2) == only("LLM_PARAM_INVALID")


def test_unlink_dead_peer(here: Service, peers: Peers) -> None:
    here.start(1)
    peer = peers()
    port = peer.call("start", 2)
    assert here.link(2, port) == OK
    peer.kill()
    assert here.unlink(2, port) == only("LLM_UNLINK_FAILED")
    assert here.link_states() == {2: "lost"}
    assert here.unlink(2, port) == only("LLM_UNLINK_FAILED")
    assert here.unlink(2, force=True) == OK
    assert here.link_states() == {}


def test_unlink_sleeping_peer(here: Service, peers: Peers) -> None:
    here.start(1)
    peer = peers()
    port = peer.call("start", 2)
    assert here.link(2, port) == OK
    with peer.stopped():
        assert here.unlink(2, port, 300) == only("LLM_TIMEOUT")
        assert here.link_states() == {2: "linked"}


def test_both_unlink_at_once(pair: tuple[Service, Service, int]) -> None:
    here, other, port = pair
    port_here = here.dd.listen_address[1]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(40):
            assert here.link(2, port) == OK
            mine = pool.submit(here.unlink, 2, port)
            theirs = pool.submit(other.unlink, 1, port_here)
            assert (mine.result(30), theirs.result(30)) == (OK, OK)
            assert (here.link_states(), other.link_states()) == ({}, {})


@pytest.mark.parametrize("force", [False, True])
def test_unlink_waits_for_a_running_transfer(
    pair: tuple[Service, Service, int], monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    here, other, port = pair
    assert here.link(2, port) == OK
    moving, go_on = threading.Event(), threading.Event()
    move = LinkChannel.move

    def held_up(self: LinkChannel, movement: Any, deadline: Any) -> str:
        moving.set()
        assert go_on.wait(30)
        return move(self, movement, deadline)

    monkeypatch.setattr(LinkChannel, "move", held_up)
    with ThreadPoolExecutor(2) as pool:
        pull = pool.submit(pull_block, here, 2)
        assert moving.wait(10)
        assert here.unlink(2, port, 100, force=force) == only("LLM_TIMEOUT")
        assert here.link_states() == {2: "linked"}
        # The other end of the link waits as well, and may call it busy.
        overall, _ = other.unlink(1, here.dd.listen_address[1], 100)
        assert overall in ("LLM_TIMEOUT", "LLM_LINK_BUSY")
        unlink = pool.submit(here.unlink, 2, port, 20_000, force=force)
        time.sleep(0.05)
        assert not unlink.done()
        go_on.set()
        assert pull.result(30) is None
        assert unlink.result(30) == OK
    assert here.colours("theirs") == [22]
    assert pull_block(here, 2).status == "LLM_NOT_YET_LINK"


# -- the end of a peer ----------------------------------------------------------------------------


@pytest.mark.parametrize("dialed_by", [1, 2])
def test_finalized_peer(pair: tuple[Service, Service, int], dialed_by: int) -> None:
    here, other, port = pair
    if dialed_by == 1:
        assert here.link(2, port) == OK
    else:
        assert other.link(1, here.dd.listen_address[1]) == OK
    other.finish()
    failure = pull_block(here, 2)
    assert failure.status == "LLM_NOT_YET_LINK"
    assert here.counters()["grants"] == 0


def test_own_finalize_forgets_links(pair: tuple[Service, Service, int]) -> None:
    here, other, port = pair
    assert here.link(2, port) == OK
    here.dd.finalize()
    assert eventually(lambda: other.link_states().get(1) != "linked")
    assert pull_block(other, 1).status == "LLM_NOT_YET_LINK"
    assert other.unlink(1, force=True) == OK
    here.held.clear()
    here.start(1)
    assert here.link(2, port) == OK
