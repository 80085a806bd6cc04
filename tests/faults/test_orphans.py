# SPDX-License-Identifier: Apache-2.0
"""Request keys that a peer had begun to pull when it was lost."""

from __future__ import annotations

import pytest

from llm_datadist_torch import CacheKey
from tests.faults.helpers import OK, Peers
from tests.peers import Peer, Ref, Service, eventually

ME = 1
KEYS = [CacheKey(ME, 7), CacheKey(ME, 8)]
LAYERS = 2


def puller(peers: Peers, cluster_id: int, port: int) -> Peer:
    peer = peers()
    peer.call("start", cluster_id)
    assert peer.call("link", ME, port) == OK
    peer.call("allocate", "row", 4, 1, 64, paged=False)
    return peer


def pull_layers(peer: Peer, key: CacheKey, layers: range) -> object:
    failure = peer.call(
        "attempt", "pull_cache", key, Ref("row"), src_layer_range=layers, dst_layer_range=layers
    )
    return failure and failure.status


@pytest.fixture
def begun(request: pytest.FixtureRequest, here: Service, peers: Peers) -> int:
    """A row of which a peer has pulled one layer of two, before it died; returns the port."""
    port = here.start(ME, options={"llm.OrphanPolicy": request.param})
    here.allocate("rows", 4, 2, 64, paged=False, keys=KEYS)
    dying = puller(peers, 2, port)
    assert pull_layers(dying, KEYS[0], range(1)) is None
    assert eventually(lambda: here.counters()["leases"] == 0)
    dying.kill()
    assert eventually(lambda: here.link_states() == {2: "lost"})
    return port


@pytest.mark.parametrize("begun", ["keep"], indirect=True)
def test_kept_with_what_was_fetched(here: Service, peers: Peers, begun: int) -> None:
    other = puller(peers, 3, begun)
    assert pull_layers(other, KEYS[0], range(1, 2)) is None
    assert eventually(lambda: here.counters()["keys"] == 1)


@pytest.mark.parametrize("begun", ["offer_again"], indirect=True)
def test_offered_again_as_a_whole(here: Service, peers: Peers, begun: int) -> None:
    other = puller(peers, 3, begun)
    assert pull_layers(other, KEYS[0], range(1, 2)) is None
    assert eventually(lambda: here.counters()["leases"] == 0)
    assert here.counters()["keys"] == 2
    assert pull_layers(other, KEYS[0], range(1)) is None
    assert eventually(lambda: here.counters()["keys"] == 1)


@pytest.mark.parametrize("begun", ["drop"], indirect=True)
def test_dropped(here: Service, peers: Peers, begun: int) -> None:
    assert eventually(lambda: here.counters()["keys"] == 1)
    other = puller(peers, 3, begun)
    assert pull_layers(other, KEYS[0], range(1, 2)) == "LLM_KV_CACHE_NOT_EXIST"
    # A key that nobody had begun to pull is untouched, and with it the memory.
    here.drop("rows")
    assert here.counters()["caches"] == 1
    assert pull_layers(other, KEYS[1], range(LAYERS)) is None
    assert eventually(lambda: here.counters()["caches"] == 0)


def test_unlinking_is_no_loss(here: Service, peers: Peers) -> None:
    port = here.start(ME, options={"llm.OrphanPolicy": "drop"})
    here.allocate("rows", 4, 2, 64, paged=False, keys=KEYS)
    peer = puller(peers, 2, port)
    assert pull_layers(peer, KEYS[0], range(1)) is None
    assert peer.call("unlink", ME, port) == OK
    assert eventually(lambda: here.link_states() == {})
    assert here.counters()["keys"] == 2
