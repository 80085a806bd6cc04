# SPDX-License-Identifier: Apache-2.0
"""Device memory between processes whose link has no engine: through the control connection."""

from __future__ import annotations

import random

import pytest

from llm_datadist_torch import Placement
from tests.npu.hixl_pair import KEY, MINE, Pair, blocks, give, here, pair, peers, pull
from tests.peers import Ref

__all__ = ["here", "pair", "peers"]

pytestmark = pytest.mark.needs_npu


both_modes = pytest.mark.parametrize(
    "pair",
    [
        {"options": {"llm.Transport": "local"}},
        {"options": {"llm.Transport": "local"}, "remote": True},
    ],
    indirect=True,
    ids=["two-sided", "remote"],
)


@both_modes
def test_blocks_both_ways(pair: Pair):
    here, there, _ = pair
    source = blocks(give(pair), 8, 4096)
    assert here.transports(2) == ("local", "local")
    order = random.Random(3).sample(range(8), 8)
    assert pull(here, order, range(8)) is None
    mine = blocks(here.dump("mine"), 8, 4096)
    assert mine == [[tensor[row] for row in order] for tensor in source]
    assert here.attempt("push_blocks", KEY, MINE, [0, 2], [7, 1]) is None
    theirs = blocks(there.call("dump", "theirs"), 8, 4096)
    for tensor, old, new in zip(theirs, source, mine, strict=True):
        assert tensor == [old[0], new[2], *old[2:7], new[0]]


@both_modes
def test_large_blocks_and_registered_tensors(pair: Pair):
    """More than one message of the relay, out of memory that the user owns."""
    here, there, _ = pair
    row_bytes = 3 << 20
    there.call("adopt", "theirs", 2, 3, row_bytes, KEY)
    data = blocks(there.call("fill", "theirs", 9), 3, row_bytes)
    here.adopt("mine", 2, 3, row_bytes)
    assert pull(here, [0, 1, 2], [2, 0, 1]) is None
    mine = blocks(here.dump("mine"), 3, row_bytes)
    assert mine == [[tensor[1], tensor[2], tensor[0]] for tensor in data]


@both_modes
def test_between_device_and_host_memory(pair: Pair):
    here, there, _ = pair
    there.call("allocate", "theirs", 2, 4, 1000, paged=True, keys=KEY, placement=Placement.HOST)
    there.call("paint", "theirs", 9)
    here.allocate("mine", 2, 4, 1000, paged=True)
    here.paint("mine", 1)
    assert pull(here, [0, 1], [3, 0]) is None
    assert here.rows("mine") == [[9, 1, 1, 9]] * 2
    assert here.attempt("push_blocks", KEY, Ref("mine"), [1], [2]) is None
    assert there.call("rows", "theirs") == [[9, 9, 1, 9]] * 2


@pytest.mark.parametrize("pair", [{"options": {"llm.Transport": "local"}}], indirect=True)
def test_device_memory_that_was_registered_by_addresses(pair: Pair):
    here, there, _ = pair
    there.call("adopt_addresses", "theirs", 2, 4, 4096, KEY)
    there.call("paint", "theirs", 5)
    here.allocate("mine", 2, 4, 4096, paged=True)
    here.paint("mine", 0)
    assert pull(here, [0, 1], [2, 3]) is None
    assert here.rows("mine") == [[0, 0, 5, 5]] * 2
    there.call("free_under_the_cache", "theirs")
    assert pull(here, [0, 1], [2, 3]).status == "LLM_KV_CACHE_NOT_EXIST"
