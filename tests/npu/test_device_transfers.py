# SPDX-License-Identifier: Apache-2.0
"""Device memory between processes of one host, by AscendCL's IPC and by `hixl` alike."""

from __future__ import annotations

import random
import threading

import pytest

from llm_datadist_torch import BlocksCacheKey
from tests.npu.hixl_pair import KEY, MINE, OK, Pair, blocks, give, here, moving, peers, pull
from tests.peers import Ref, eventually

__all__ = ["here", "moving", "peers"]

pytestmark = pytest.mark.needs_hixl


def test_pull_blocks(moving: Pair):
    here, _, _ = moving
    source = blocks(give(moving), 8, 4096)
    order = random.Random(3).sample(range(8), 8)
    assert pull(here, order, range(8)) is None
    mine = blocks(here.dump("mine"), 8, 4096)
    assert mine == [[tensor[row] for row in order] for tensor in source]


def test_push_blocks(moving: Pair):
    here, there, _ = moving
    before = blocks(give(moving), 8, 4096)
    mine = blocks(here.fill("mine", 5), 8, 4096)
    assert here.attempt("push_blocks", KEY, MINE, [0, 2, 1], [7, 1, 4]) is None
    for tensor, old, new in zip(
        blocks(there.call("dump", "theirs"), 8, 4096), before, mine, strict=True
    ):
        expected = list(old)
        expected[7], expected[1], expected[4] = new[0], new[2], new[1]
        assert tensor == expected


def test_both_directions_at_once(moving: Pair):
    """HIXL's connections have one direction; a link has both."""
    here, there, _ = moving
    give(moving)
    here.allocate("ours", 2, 8, 4096, paged=True, keys=BlocksCacheKey(1, 0))
    here.paint("ours", 77)
    there.call("allocate", "wanted", 2, 8, 4096, paged=True)
    order = list(range(8))
    there.begin("attempt", "pull_blocks", BlocksCacheKey(1, 0), Ref("wanted"), order, order)
    assert pull(here) is None
    assert there.answer() is None
    assert there.call("rows", "wanted") == [[77] * 8] * 2


def test_registered_tensors(moving: Pair):
    here, there, _ = moving
    there.call("adopt", "theirs", 3, 4, 512, KEY)
    there.call("paint", "theirs", 42)
    here.adopt("mine", 3, 4, 512)
    assert pull(here, [0, 3], [2, 1]) is None
    assert here.rows("mine") == [[0, 42, 42, 0]] * 3


def test_the_peer_is_killed(moving: Pair):
    here, there, _ = moving
    give(moving)
    assert pull(here) is None
    there.kill()
    count, failure = here.hammer("pull_blocks", KEY, MINE, [0, 1], [0, 1])
    assert count < 1000
    assert failure.status in {"LLM_NOT_YET_LINK", "LLM_FAILED"}
    assert eventually(lambda: here.link_states() == {2: "lost"})
    assert pull(here).status == "LLM_NOT_YET_LINK"


def test_unlink_and_link_again(moving: Pair):
    here, _, port = moving
    give(moving)
    for _ in range(3):
        assert pull(here) is None
        assert here.unlink(2, port) == OK
        assert pull(here).status == "LLM_NOT_YET_LINK"
        assert here.link(2, port) == OK
    assert pull(here) is None


def test_threads_that_have_set_no_device(moving: Pair):
    here, _, _ = moving
    data = blocks(give(moving), 8, 4096)
    failures = []
    threads = [
        threading.Thread(target=lambda row=row: failures.append(pull(here, [row], [row])))
        for row in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == [None] * 8
    assert blocks(here.dump("mine"), 8, 4096) == data


def test_background_transfers_and_many_blocks(moving: Pair):
    here, _, _ = moving
    rows = 6000
    data = blocks(give(moving, rows, 64), rows, 64)
    order = random.Random(8).sample(range(rows), rows)
    task = here.manager.pull_blocks_async(KEY, here.held["mine"].cache, order, list(range(rows)))
    assert task.synchronize().name == "LLM_SUCCESS"
    assert blocks(here.dump("mine"), rows, 64) == [[tensor[r] for r in order] for tensor in data]
