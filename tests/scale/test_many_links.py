# SPDX-License-Identifier: Apache-2.0
"""512 links on one instance, made by either side, and what becomes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch

from llm_datadist_torch import BlocksCacheKey, LinkEvent, LLMDataDist, LLMRole
from tests.conftest import make_options
from tests.peers import Peer, eventually, spawn
from tests.scale.many import DESC, Many, block, colour_of, infos

pytestmark = pytest.mark.thorough

PROCESSES, EACH = 4, 128
ME = 1
OK = "LLM_SUCCESS"


@pytest.fixture(scope="module")
def crowd() -> Iterator[tuple[list[Peer], list[tuple[int, int]]]]:
    """Processes with 512 instances, and their ids and ports."""
    made = [spawn(Many) for _ in range(PROCESSES)]
    for number, peer in enumerate(made):
        peer.begin("start_many", 1000 * (number + 1), EACH)
    yield made, [address for peer in made for address in peer.answer()]
    for peer in made:
        peer.close()


@pytest.fixture
def here() -> Iterator[LLMDataDist]:
    datadist = LLMDataDist(LLMRole.MIX, ME)
    datadist.init(make_options(device="cpu", timeout_ms=30_000))
    yield datadist
    datadist.finalize()


def pull_from(here: LLMDataDist, peers: Sequence[int]) -> None:
    room = here.cache_manager.allocate_blocks_cache(DESC)
    for peer in peers:
        here.cache_manager.pull_blocks(BlocksCacheKey(peer, 0), room, [0, 1], [1, 0])
        assert all(torch.equal(t, torch.full_like(t, colour_of(peer))) for t in room.tensors), peer
    here.cache_manager.deallocate_blocks_cache(room)


def states(here: LLMDataDist) -> dict[str, int]:
    return Counter(info.state for info in here.links())


def test_dialing_and_being_dialed(
    here: LLMDataDist, crowd: tuple[list[Peer], list[tuple[int, int]]]
) -> None:
    peers, addresses = crowd
    ids = [peer for peer, _ in addresses]
    overall, each = here.link_clusters(infos(addresses), 60_000)
    assert (overall.name, Counter(status.name for status in each)) == (OK, {OK: len(ids)})
    pull_from(here, ids[::8])
    assert here.unlink_clusters(infos(addresses), 60_000)[0].name == OK
    assert here.links() == []
    assert eventually(lambda: sum(peer.call("num_linked") for peer in peers) == 0, 60)

    for peer in peers:
        peer.begin("link_many", ME, here.listen_address[1])
    assert Counter(status for peer in peers for status in peer.answer()) == {OK: len(ids)}
    assert states(here) == {"linked": len(ids)}
    pull_from(here, ids[::8])

    # A quarter of them dies at once: those links are lost, and the others are served.
    seen: list[LinkEvent] = []
    here.on_link_event(seen.append)
    block(here, ME)
    peers[-1].kill()
    dead = {peer for peer in ids if peer >= 1000 * PROCESSES}
    assert eventually(lambda: states(here)["lost"] == len(dead), 60)
    assert eventually(lambda: len(seen) >= len(dead), 60)
    assert {event.peer for event in seen} == dead
    pull_from(here, [peer for peer in ids[::8] if peer not in dead])
    # We end all links; peers that close their side while we still tell others are not lost.
    seen.clear()
    here.finalize()
    assert Counter(event.kind for event in seen) == {"unlinked": len(ids)}
