# SPDX-License-Identifier: Apache-2.0
"""What a peer still uses when its link ends: it is waited for, for so long; then it is kept."""

from __future__ import annotations

import time

import pytest

from llm_datadist_torch import BlocksCacheKey, CacheDesc, DataType
from tests.peers import Peer, Ref, Service, eventually
from tests.transfer.helpers import OK, Peers

ME, PEER = 1, 2
MINE = BlocksCacheKey(ME, 0)
DESC = CacheDesc(2, [2, 64], DataType.DT_UINT8)
POOL = '{"memory_size": 131072, "page_shift": 16}'
"""Room for the two tensors of one cache."""


@pytest.fixture(params=["dialed by the peer", "dialed here"])
def slow(request: pytest.FixtureRequest, here: Service, peers: Peers) -> Peer:
    """A peer whose transfers take half a second."""
    port = here.start(ME, pool=POOL, timeout_ms=300)
    peer = peers()
    port_there = peer.call("start", PEER)
    linked = (
        here.link(PEER, port_there)
        if request.param == "dialed here"
        else peer.call("link", ME, port)
    )
    assert linked == OK
    peer.call("allocate", "theirs", 2, 2, 64, paged=True)
    peer.call("paint", "theirs", 5)
    peer.call("slow_moves", 0.5)
    return peer


def begin(here: Service, peer: Peer, operation: str) -> None:
    """The peer has a lease, and has not moved a byte."""
    peer.begin("attempt", operation, MINE, Ref("theirs"), [0, 1], [0, 1])
    assert eventually(lambda: here.counters()["leases"] == 1)
    # The answer that grants it goes out a moment later.
    time.sleep(0.1)


def ended_well_or_typed(peer: Peer) -> None:
    """Its bytes were right, because the memory was kept; the news of the end may come first."""
    failure = peer.answer()
    assert failure is None or failure.status == "LLM_NOT_YET_LINK"


@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
def test_unlink_by_force_waits_for_the_peer(here: Service, slow: Peer, operation: str) -> None:
    here.allocate("mine", 2, 2, 64, paged=True, keys=MINE)
    here.paint("mine", 9)
    begin(here, slow, operation)
    assert here.unlink(PEER, None, 20_000, force=True) == OK
    assert here.counters()["leases"] == 0
    assert slow.answer() is None
    assert slow.call("colours", "theirs") == here.colours("mine")
    assert (
        slow.call("attempt", operation, MINE, Ref("theirs"), [0], [0]).status == "LLM_NOT_YET_LINK"
    )


@pytest.mark.parametrize("end", ["it wakes up", "it dies"])
@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
def test_what_a_sleeping_peer_uses_is_not_freed(
    here: Service, slow: Peer, operation: str, end: str
) -> None:
    here.allocate("mine", 2, 2, 64, paged=True, keys=MINE)
    begin(here, slow, operation)
    with slow.stopped():
        started = time.monotonic()
        assert here.unlink(PEER, None, 100, force=True) == OK
        assert time.monotonic() - started < 15
        assert here.link_states() == {}
        here.drop("mine")
        # A new cache would get the memory that the peer is about to read or to write.
        failure = here.attempt("allocate_blocks_cache", DESC)
        assert failure is not None
        assert failure.status == "LLM_OUT_OF_MEMORY"
        if end == "it dies":
            slow.kill()
            assert eventually(lambda: here.counters()["leases"] == 0)
    if end == "it wakes up":
        ended_well_or_typed(slow)
    # The lease is counted down a moment before the pages are free.
    assert eventually(lambda: here.counters()["leases"] == here.arena_in_use() == 0)
    here.allocate("mine", 2, 2, 64, paged=True, keys=MINE)


def test_unregister_waits_also_after_unlink(here: Service, slow: Peer) -> None:
    cache_id = here.register("mine", 2, 2, 64, paged=True, keys=MINE)
    begin(here, slow, "push_blocks")
    with slow.stopped():
        assert here.unlink(PEER, None, 100, force=True) == OK
        assert here.attempt("unregister_cache", cache_id).status == "LLM_TIMEOUT"
    ended_well_or_typed(slow)
    assert eventually(lambda: here.attempt("unregister_cache", cache_id) is None)


def test_linked_again_while_the_old_lease_lasts(here: Service, slow: Peer) -> None:
    here.allocate("mine", 2, 2, 64, paged=True, keys=MINE)
    port = here.dd.listen_address[1]
    begin(here, slow, "pull_blocks")
    with slow.stopped():
        assert here.unlink(PEER, None, 100, force=True) == OK
    ended_well_or_typed(slow)
    assert eventually(lambda: slow.call("link", ME, port) == OK)
    assert eventually(lambda: here.counters()["leases"] == 0)
    assert slow.call("attempt", "pull_blocks", MINE, Ref("theirs"), [0], [0]) is None


@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
def test_finalize_waits_for_the_peer(here: Service, peers: Peers, operation: str) -> None:
    port = here.start(ME, timeout_ms=20_000)
    peer = peers()
    peer.call("start", PEER)
    assert peer.call("link", ME, port) == OK
    peer.call("allocate", "theirs", 2, 2, 64, paged=True)
    peer.call("slow_moves", 0.5)
    here.allocate("mine", 2, 2, 64, paged=True, keys=MINE)
    begin(here, peer, operation)
    here.finish()
    assert peer.answer() is None


def test_finalize_does_not_wait_for_a_sleeping_peer(here: Service, slow: Peer) -> None:
    here.allocate("mine", 2, 2, 64, paged=True, keys=MINE)
    begin(here, slow, "pull_blocks")
    with slow.stopped():
        started = time.monotonic()
        here.finish()
        assert time.monotonic() - started < 15
    ended_well_or_typed(slow)
