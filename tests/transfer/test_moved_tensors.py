# SPDX-License-Identifier: Apache-2.0
"""Memory of a cache that torch replaced: who uses the cache is told, and no byte moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey
from tests.caches import MOVES
from tests.peers import NearPeer, Peer, Ref, Service, spawn

BLOCKS = [0, 1, 2]
SIZE = (2, 4, 4096)
IDS = {"far": 2, "near": 3, "relayed": 4}
POOL = '{"memory_size": 1048576, "page_shift": 12}'


@dataclass
class World:
    here: Service
    peers: dict[str, Peer | NearPeer]
    made: int = 0

    def caches(self, peer: str, mine: str, theirs: str) -> tuple[str, BlocksCacheKey]:
        """A cache here painted 1, and one of the peer painted 2."""
        self.made += 1
        name, key = f"c{self.made}", BlocksCacheKey(IDS[peer], self.made)
        self.here.make(mine, name, *SIZE, paged=True)
        self.here.paint(name, 1)
        self.peers[peer].call("make", theirs, name, *SIZE, paged=True, keys=key)
        self.peers[peer].call("paint", name, 2)
        return name, key

    def drop(self, peer: str, name: str) -> None:
        self.here.drop(name)
        self.peers[peer].call("drop", name)


@pytest.fixture(scope="module", params=[False, True], ids=["two-sided", "known"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    here = Service()
    remote = request.param
    here.start(1, remote=remote, pool=POOL, device="cpu")
    peers: dict[str, Peer | NearPeer] = {"far": spawn(), "near": NearPeer(), "relayed": spawn()}
    for name, peer in peers.items():
        pool = POOL if name == "near" else None
        port = peer.call("start", IDS[name], remote=remote, pool=pool, device="cpu")
        assert here.link(IDS[name], port)[0] == "LLM_SUCCESS"
    here.only_relay(IDS["relayed"])
    yield World(here, peers)
    for peer in peers.values():
        peer.close()
    here.finish()


def operation(world: World, which: str, name: str, key: BlocksCacheKey) -> Any:
    return world.here.attempt(which, key, Ref(name), BLOCKS, BLOCKS)


# torch refuses to resize storages over memory of ours.
KINDS = [(kind, how) for kind in ("allocated", "tensors") for how in MOVES]
KINDS.remove(("allocated", "resize"))


@pytest.mark.parametrize(("kind", "how"), KINDS)
@pytest.mark.parametrize("side", ["mine", "theirs"])
@pytest.mark.parametrize("which", ["pull_blocks", "push_blocks"])
@pytest.mark.parametrize("peer", IDS)
def test_a_transfer_is_refused(
    world: World, peer: str, which: str, side: str, kind: str, how: str
) -> None:
    name, key = world.caches(peer, kind, kind)
    # In remote-accessible mode the next pull knows the cache.
    assert operation(world, which, name, key) is None
    there = world.peers[peer].call
    colours = (world.here.colours(name), there("colours", name))
    if side == "mine":
        world.here.move_tensor(name, how, 1)
    else:
        there("move_tensor", name, how, 1)
    failure = operation(world, which, name, key)
    assert failure is not None
    assert failure.status == "LLM_KV_CACHE_NOT_EXIST"
    assert "has moved from 0x" in failure.text
    if how in ("data", "set"):
        assert failure.text.startswith("tensor 1 of cache")
    assert "share_memory_()" in failure.text
    assert "make a new one" in failure.text
    assert colours == (world.here.colours(name), there("colours", name))
    world.drop(peer, name)


@pytest.mark.parametrize(("kind", "how"), KINDS)
def test_a_local_copy_is_refused(world: World, kind: str, how: str) -> None:
    world.here.make(kind, "local", *SIZE, paged=True)
    world.here.paint("local", 5)
    world.here.move_tensor("local", how, 0)
    failure = world.here.attempt("copy_blocks", Ref("local"), {0: [1]})
    assert failure is not None
    assert failure.status == "LLM_KV_CACHE_NOT_EXIST"
    world.here.drop("local")
