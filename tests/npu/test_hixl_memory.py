# SPDX-License-Identifier: Apache-2.0
"""Memory comes and goes while HIXL is connected, which HIXL itself does not allow."""

from __future__ import annotations

import threading
import time

import pytest

from llm_datadist_torch import BlocksCacheKey
from tests.npu.hixl_pair import KEY, Pair, blocks, give, here, pair, peers, pull
from tests.peers import NearPeer, Ref, eventually

__all__ = ["here", "pair", "peers"]

pytestmark = pytest.mark.needs_simulated_npu

only_hixl = pytest.mark.parametrize("pair", [{"options": {"llm.Transport": "hixl"}}], indirect=True)


@pytest.mark.parametrize("pair", [{}, {"remote": True}], indirect=True, ids=["two-sided", "remote"])
def test_a_hundred_caches_cost_a_few_connections(pair: Pair):
    here, there, _ = pair
    there.call("allocate", "0", 1, 4, 512, paged=True, keys=BlocksCacheKey(2, 0))
    there.call("paint", "0", 0)
    here.allocate("mine", 1, 4, 512, paged=True)
    assert pull(here, [0], [0]) is None
    before = here.calls("hixl.connect")
    for number in range(1, 101):
        there.call("allocate", str(number), 1, 4, 512, paged=True, keys=BlocksCacheKey(2, number))
        there.call("paint", str(number), number)
        earlier = number // 2
        assert pull(here, [0], [0], BlocksCacheKey(2, earlier)) is None
        assert here.rows("mine")[0][0] == earlier

    def by_hixl():
        count = here.calls("hixl.transfer_async")
        assert pull(here, [1], [1], BlocksCacheKey(2, 100)) is None
        return here.calls("hixl.transfer_async") > count

    assert eventually(by_hixl)
    assert here.rows("mine")[0][1] == 100
    assert here.calls("hixl.connect") - before <= 3


@only_hixl
def test_new_memory_is_reached_where_nothing_else_serves(pair: Pair):
    """The connection is made anew, and the movement waits for it."""
    here, there, _ = pair
    give(pair)
    assert pull(here) is None
    there.call("allocate", "late", 2, 8, 4096, paged=True, keys=BlocksCacheKey(2, 7))
    there.call("paint", "late", 7)
    assert pull(here, [0], [0], BlocksCacheKey(2, 7)) is None
    here.allocate("mine", 2, 8, 4096, paged=True)
    here.paint("mine", 1)
    assert pull(here, [0, 1], [2, 3], BlocksCacheKey(2, 7)) is None
    assert here.rows("mine") == [[1, 1, 7, 7, 1, 1, 1, 1]] * 2


@only_hixl
def test_dropped_memory_is_deregistered_on_both_sides(pair: Pair):
    """Both are connected with each other; both disconnect, and pull again afterwards."""
    here, there, _ = pair
    give(pair)
    here.allocate("ours", 2, 8, 4096, paged=True, keys=BlocksCacheKey(1, 0))
    here.paint("ours", 9)
    there.call("allocate", "wanted", 2, 8, 4096, paged=True)
    order = list(range(8))
    back = ("attempt", "pull_blocks", BlocksCacheKey(1, 0), Ref("wanted"), order, order)
    assert pull(here) is None
    assert there.call(*back) is None
    for side in (NearPeer(here), there):
        before = side.call("registered")
        side.call("allocate", "extra", 2, 8, 4096, paged=True)
        assert side.call("registered") == before + 1
        side.call("drop", "extra")
        assert eventually(lambda side=side, before=before: side.call("registered") == before)
    assert pull(here) is None
    assert there.call(*back) is None
    assert there.call("rows", "wanted") == [[9] * 8] * 2


@only_hixl
def test_memory_given_by_addresses_is_deregistered_when_its_unregistering_returns(pair: Pair):
    here, there, _ = pair
    there.call("adopt_addresses", "theirs", 2, 8, 4096, KEY)
    there.call("paint", "theirs", 4)
    here.allocate("mine", 2, 8, 4096, paged=True)
    here.paint("mine", 0)
    assert pull(here) is None
    assert there.call("registered") == 2
    there.call("drop", "theirs")
    assert there.call("registered") == 0


@pytest.mark.parametrize(
    "pair", [{"options": {"llm.Transport": "hixl"}, "timeout_ms": 60_000}], indirect=True
)
def test_movements_under_way_are_waited_for(pair: Pair):
    here, there, _ = pair
    source = blocks(give(pair, 8, 1 << 20), 8, 1 << 20)
    here.slow("hixl.step", 0.02)
    failures = []
    thread = threading.Thread(
        target=lambda: failures.append(pull(here, range(8), range(8))), daemon=True
    )
    thread.start()
    assert eventually(lambda: here.calls("hixl.step") > 2)
    there.call("allocate", "extra", 2, 8, 4096, paged=True)
    before = there.call("registered")
    there.call("drop", "extra")
    thread.join(60)
    assert failures == [None]
    here.mend()
    assert blocks(here.dump("mine"), 8, 1 << 20) == source
    assert eventually(lambda: there.call("registered") == before - 1)


@only_hixl
def test_memory_is_kept_until_it_is_deregistered(pair: Pair):
    """The peer sleeps: it does not disconnect, and might write. Then it wakes up."""
    here, there, _ = pair
    here.allocate("ours", 2, 8, 1 << 20, paged=True, keys=BlocksCacheKey(1, 0))
    here.paint("ours", 3)
    there.call("allocate", "wanted", 2, 8, 1 << 20, paged=True)
    order = [0, 1]
    back = ("attempt", "pull_blocks", BlocksCacheKey(1, 0), Ref("wanted"), order, order)
    assert there.call(*back) is None
    used = here.memory_allocated()
    with there.stopped():
        here.drop("ours")
        time.sleep(0.5)
        assert here.memory_allocated() == used
        assert here.registered() == 1
    assert eventually(lambda: here.registered() == 0)
    assert eventually(lambda: here.memory_allocated() < used)
