# SPDX-License-Identifier: Apache-2.0
"""Layer-by-layer transfers to several peers, one of which dies, or its engine fails."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey, CacheTask, TransferWithCacheKeyConfig
from llm_datadist_torch.transports.choice import LinkChannel
from llm_datadist_torch.values.status import LLMStatusCode, error_for
from tests.asynchronous.helpers import FAILED, NYL, SUCCESS, WAIT_MS, Gate
from tests.faults.helpers import ME, OK, PEER, Peers, at_rest
from tests.peers import Peer, Service, eventually

LAYERS, OTHER = 4, 3
SHAPE = (2 * LAYERS, 4, 4096)
BLOCKS = [0, 1, 2, 3]


@pytest.fixture
def targets(here: Service, peers: Peers) -> list[Peer]:
    """Two linked peers with room for what is here, full of 1."""
    here.start(ME)
    here.allocate("mine", *SHAPE, paged=True)
    here.paint("mine", 7)
    made = []
    for number in (PEER, OTHER):
        peer = peers()
        port = peer.call("start", number)
        peer.call("allocate", "theirs", *SHAPE, paged=True, keys=BlocksCacheKey(number, 0))
        peer.call("paint", "theirs", 1)
        assert here.link(number, port) == OK
        made.append(peer)
    return made


def send(here: Service, gate: Gate) -> CacheTask:
    layers = range(LAYERS)
    configs = [
        TransferWithCacheKeyConfig(BlocksCacheKey(number, 0), layers, layers)
        for number in (PEER, OTHER)
    ]
    cache = here.held["mine"].cache
    return here.manager.transfer_cache_async(cache, gate, configs, BLOCKS, BLOCKS)


@pytest.mark.parametrize("before", range(LAYERS))
def test_a_target_dies(here: Service, targets: list[Peer], before: int) -> None:
    gate = Gate(LAYERS)
    task = send(here, gate)
    for layer in range(before):
        gate.gates[layer].set()
    assert gate.entered[before].wait(60)
    targets[0].kill()
    assert eventually(lambda: here.link_states()[PEER] == "lost")
    gate.open()
    assert task.get_results(WAIT_MS) == [NYL, SUCCESS]
    assert targets[1].call("colours", "theirs") == [7]
    assert eventually(lambda: at_rest(here))
    assert eventually(lambda: at_rest(lambda what: targets[1].call(what)))


def test_an_engine_that_fails_in_one_layer(
    here: Service, targets: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = here.instance.links.find(PEER).channel
    move, moves = LinkChannel.move, []

    def failing(self: LinkChannel, movement: Any, deadline: Any) -> str:
        if self is broken:
            moves.append(movement)
            if len(moves) == 3:
                raise error_for(LLMStatusCode.LLM_FAILED, "the engine failed")
        return move(self, movement, deadline)

    gate = Gate(LAYERS)
    gate.open()
    with monkeypatch.context() as patch:
        patch.setattr(LinkChannel, "move", failing)
        assert send(here, gate).get_results(WAIT_MS) == [FAILED, SUCCESS]
    # What failed is not sent any further, and does not count as done.
    assert len(moves) == 3
    assert targets[0].call("colours", "theirs") == [1, 7]
    assert targets[1].call("colours", "theirs") == [7]
    for service in (here, *[peer.call for peer in targets]):
        assert eventually(lambda service=service: at_rest(service))
    # The link works as before.
    assert send(here, gate).get_results(WAIT_MS) == [SUCCESS, SUCCESS]
    assert targets[0].call("colours", "theirs") == [7]
