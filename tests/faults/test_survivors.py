# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to one transfer: others go on, no wrong byte counts, and nothing is left."""

from __future__ import annotations

import os
import random
import threading
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey
from llm_datadist_torch.transports.choice import LinkChannel
from llm_datadist_torch.values.status import LLMStatusCode, error_for
from tests.faults.helpers import ME, NYL, OK, PEER, THEIRS, Peers, pull, start_here, start_peer
from tests.peers import Peer, Ref, Service, eventually

MINE = BlocksCacheKey(ME, 0)
BIG = (4, 16, 65536)
"""Tensors, blocks and bytes of a block: 4 MiB."""
BLOCKS = list(range(16))
POOL = '{"memory_size": 33554432, "page_shift": 16}'


def start_big(peer: Peer, colour: int, listen: str) -> int:
    port = peer.call("start", PEER, listen=listen, pool=POOL)
    peer.call("allocate", "theirs", *BIG, paged=True, keys=THEIRS)
    peer.call("paint", "theirs", colour)
    return port


@pytest.mark.thorough
def test_sigkill_of_either_side_during_200_transfers(here: Service, peers: Peers) -> None:
    seed = int(os.environ.get("LLMDD_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"seed {seed}")
    rng = random.Random(seed)
    port_here = here.start(ME, pool=POOL)
    here.allocate("mine", *BIG, paged=True, keys=MINE)
    at_rest = here.counters(), here.pool_stats()
    witness = peers()
    witness.call("start", 3)
    witness.call("allocate", "copy", *BIG, paged=True)
    assert witness.call("link", ME, port_here) == OK
    port, done, colour = 0, 0, 0
    while done < 200 or colour < 10:
        colour = colour % 250 + 1
        peer = peers()
        port = start_big(peer, colour, f"127.0.0.1:{port}")
        if colour == 1:
            assert here.link(PEER, port) == OK
        killer = threading.Timer(rng.random() * 0.02, peer.kill)
        if colour % 3:
            # We work: the link to each new process is made by the first transfer.
            count, failure = work_until_it_dies(here, colour, killer, 20 + rng.randrange(20))
            done += count
        else:
            # It works, until it dies.
            here.attempt("pull_blocks", THEIRS, Ref("mine"), [0], [0])
            peer.begin("hammer", "pull_blocks", MINE, Ref("theirs"), BLOCKS, BLOCKS)
            killer.start()
            assert eventually(lambda: here.link_states()[PEER] == "lost")
            failure = here.attempt("pull_blocks", THEIRS, Ref("mine"), [0], [0])
        killer.join()
        assert failure.status == NYL, (colour, failure)
        # The others are served, with the right bytes.
        here.paint("mine", colour)
        assert witness.call("attempt", "pull_blocks", MINE, Ref("copy"), BLOCKS, BLOCKS) is None
        assert witness.call("colours", "copy") == [colour]
        assert eventually(lambda: (here.counters(), here.pool_stats()) == at_rest), colour
        peer.close()
    here.drop("mine")
    assert eventually(lambda: here.arena_in_use() == 0)


def work_until_it_dies(
    here: Service, colour: int, killer: threading.Timer, afterwards: int
) -> tuple[int, Any]:
    for count in range(10_000):
        if count == afterwards:
            killer.start()
        operation = ("pull_blocks", "push_blocks")[count % 2]
        if operation == "pull_blocks":
            here.paint("mine", 0)
        failure = here.attempt(operation, THEIRS, Ref("mine"), BLOCKS, BLOCKS)
        if failure is not None:
            return count, failure
        # Every byte of every success.
        tensors = here.held["mine"].cache.tensors
        assert all(bool((tensor == colour).all()) for tensor in tensors), count
    raise AssertionError("it lives")


def test_a_full_pool(here: Service, peers: Peers) -> None:
    """Nothing new fits, what is there goes on, and a failed transfer leaves no block taken."""
    here.start(ME, pool='{"memory_size": 131072, "page_shift": 16}')
    here.allocate("mine", 2, 4, 64, paged=True)
    peer = peers()
    assert here.link(PEER, start_peer(peer, 5)) == OK
    desc = here.held["mine"].cache.cache_desc
    for _ in range(3):
        assert here.attempt("allocate_blocks_cache", desc).status == "LLM_OUT_OF_MEMORY"
        assert pull(here) is None
    assert here.colours("mine") == [5]
    peer.kill()
    assert pull(here).status == NYL
    here.drop("mine")
    assert here.arena_in_use() == 0
    here.allocate("mine", 2, 4, 64, paged=True)


@pytest.mark.parametrize("half", [False, True], ids=["before a byte", "after half of it"])
@pytest.mark.parametrize("kind", ["typed", "unexpected"])
def test_an_engine_that_fails(
    here: Service, peers: Peers, monkeypatch: pytest.MonkeyPatch, kind: str, half: bool
) -> None:
    peer = peers()
    start_here(here)
    assert here.link(PEER, start_peer(peer, 5)) == OK
    move = LinkChannel.move

    def failing(self: LinkChannel, movement: Any, deadline: Any) -> str:
        if half:
            move(self, movement, deadline)
        if kind == "typed":
            raise error_for(LLMStatusCode.LLM_FAILED, "the engine failed")
        raise RuntimeError("the engine broke")

    with monkeypatch.context() as patch:
        patch.setattr(LinkChannel, "move", failing)
        if kind == "typed":
            failure = pull(here)
            assert (failure.status, "the engine failed" in failure.text) == ("LLM_FAILED", True)
        else:
            with pytest.raises(RuntimeError, match="the engine broke"):
                pull(here)
    assert eventually(lambda: not peer.call("counters")["leases"])
    assert here.counters()["leases"] == 0
    assert pull(here) is None
    assert here.colours("mine") == [5]
