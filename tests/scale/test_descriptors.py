# SPDX-License-Identifier: Apache-2.0
"""A process that may open no more descriptors says so, and goes on with what it has."""

from __future__ import annotations

import pytest

from llm_datadist_torch import BlocksCacheKey
from tests.faults.helpers import ME, OK, PEER, Peers, pull, start_here, start_peer
from tests.peers import Peer, Ref, Service, eventually, spawn
from tests.scale.many import Many

FAILED = ("LLM_LINK_FAILED", ["LLM_LINK_FAILED"])
OTHER = 3


@pytest.fixture
def poor():
    """A process that will have too few."""
    peer = spawn(Many)
    yield peer
    peer.close()


def test_a_new_instance_and_a_new_link(here: Service, peers: Peers, poor: Peer) -> None:
    poor.call("note_paths")
    port_here, port = start_here(here), poor.call("start", PEER)
    poor.call("allocate", "theirs", 2, 4, 64, paged=True, keys=BlocksCacheKey(PEER, 0))
    poor.call("paint", "theirs", 5)
    assert poor.call("link", ME, port_here) == OK
    other = peers()
    port_other = other.call("start", OTHER)
    poor.call("limit_descriptors", 8)
    failure = poor.call("try_to_start")
    assert failure.status == "LLM_FAILED"
    for text in ("8 descriptors are left, 32 are needed", "RLIMIT_NOFILE", "ulimit -n"):
        assert text in failure.text
    assert poor.call("link", OTHER, port_other) == FAILED
    assert "linking cluster 3 failed: 8 descriptors are left" in poor.call("noted")[1][-1]
    # The links that are there work, and peers that dial are let in while there is one left.
    assert pull(here) is None
    assert here.colours("mine") == [5]
    assert other.call("link", PEER, port) == OK
    poor.call("unlimit_descriptors")
    assert poor.call("unlink", OTHER, port_other) == OK
    assert poor.call("link", OTHER, port_other) == OK
    assert poor.call("try_to_start") is None


def test_none_left_for_those_who_dial(here: Service, poor: Peer) -> None:
    port = start_peer(poor, 5)
    start_here(here)
    assert here.link(PEER, port) == OK
    poor.call("limit_descriptors", 0)
    near = Service()
    try:
        near.start(OTHER)
        near.allocate("room", 2, 4, 64, paged=True)
        # It is not let in, in its own time; whoever is linked is served.
        assert near.link(PEER, port, 300)[0] != "LLM_SUCCESS"
        assert pull(here) is None
        assert here.colours("mine") == [5]
        poor.call("unlimit_descriptors")
        assert eventually(lambda: near.link(PEER, port, 1000) == OK)
        ids = [0, 1, 2, 3]
        assert near.attempt("pull_blocks", BlocksCacheKey(PEER, 0), Ref("room"), ids, ids) is None
        assert near.colours("room") == [5]
    finally:
        near.finish()
