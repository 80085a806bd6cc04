# SPDX-License-Identifier: Apache-2.0
"""Memory comes and goes while HIXL is connected, which HIXL itself does not allow."""

from __future__ import annotations

import threading
import time

import pytest

from llm_datadist_torch import BlocksCacheKey
from tests.npu.hixl_pair import KEY, Pair, blocks, give, here, pair, peers, pull
from tests.peers import NearPeer, Ref, settle

__all__ = ["here", "pair", "peers"]

pytestmark = pytest.mark.needs_simulated_npu

only_hixl = pytest.mark.parametrize("pair", [{"options": {"llm.Transport": "hixl"}}], indirect=True)


@pytest.mark.parametrize("pair", [{}, {"remote": True}], indirect=True, ids=["two-sided", "remote"])
def test_a_hundred_caches_cost_a_few_connections(pair: Pair):
    here, there, _ = pair
    there.ask("allocate", "0", 1, 4, 512, paged=True, keys=BlocksCacheKey(2, 0))
    there.ask("paint", "0", 0)
    here.allocate("mine", 1, 4, 512, paged=True)
    assert pull(here, [0], [0]) is None
    before = here.calls("hixl.connect")
    for number in range(1, 101):
        there.ask("allocate", str(number), 1, 4, 512, paged=True, keys=BlocksCacheKey(2, number))
        there.ask("paint", str(number), number)
        earlier = number // 2
        assert pull(here, [0], [0], BlocksCacheKey(2, earlier)) is None
        assert here.rows("mine")[0][0] == earlier

    def by_hixl():
        count = here.calls("hixl.transfer_async")
        assert pull(here, [1], [1], BlocksCacheKey(2, 100)) is None
        return here.calls("hixl.transfer_async") > count

    assert settle(by_hixl)
    assert here.rows("mine")[0][1] == 100
    assert here.calls("hixl.connect") - before <= 3


@only_hixl
def test_new_memory_is_reached_where_nothing_else_serves(pair: Pair):
    """The connection is made anew, and the movement waits for it."""
    here, there, _ = pair
    give(pair)
    assert pull(here) is None
    there.ask("allocate", "late", 2, 8, 4096, paged=True, keys=BlocksCacheKey(2, 7))
    there.ask("paint", "late", 7)
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
    there.ask("allocate", "wanted", 2, 8, 4096, paged=True)
    order = list(range(8))
    back = ("attempt", "pull_blocks", BlocksCacheKey(1, 0), Ref("wanted"), order, order)
    assert pull(here) is None
    assert there.ask(*back) is None
    for side in (NearPeer(here), there):
        before = side.ask("registered")
        side.ask("allocate", "extra", 2, 8, 4096, paged=True)
        assert side.ask("registered") == before + 1
        side.ask("drop", "extra")
        assert settle(lambda side=side, before=before: side.ask("registered") == before)
    assert pull(here) is None
    assert there.ask(*back) is None
    assert there.ask("rows", "wanted") == [[9] * 8] * 2


@only_hixl
def test_memory_given_by_addresses_is_deregistered_when_its_unregistering_returns(pair: Pair):
    here, there, _ = pair
    there.ask("adopt_addresses", "theirs", 2, 8, 4096, KEY)
    there.ask("paint", "theirs", 4)
    here.allocate("mine", 2, 8, 4096, paged=True)
    here.paint("mine", 0)
    assert pull(here) is None
    assert there.ask("registered") == 2
    there.ask("drop", "theirs")
    assert there.ask("registered") == 0


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
    assert settle(lambda: here.calls("hixl.step") > 2)
    there.ask("allocate", "extra", 2, 8, 4096, paged=True)
    before = there.ask("registered")
    there.ask("drop", "extra")
    thread.join(60)
    assert failures == [None]
    here.mend()
    assert blocks(here.dump("mine"), 8, 1 << 20) == source
    assert settle(lambda: there.ask("registered") == before - 1)


@only_hixl
def test_memory_is_kept_until_it_is_deregistered(pair: Pair):
    """The peer sleeps: it does not disconnect, and might write. Then it wakes up."""
    here, there, _ = pair
    here.allocate("ours", 2, 8, 1 << 20, paged=True, keys=BlocksCacheKey(1, 0))
    here.paint("ours", 3)
    there.ask("allocate", "wanted", 2, 8, 1 << 20, paged=True)
    order = [0, 1]
    back = ("attempt", "pull_blocks", BlocksCacheKey(1, 0), Ref("wanted"), order, order)
    assert there.ask(*back) is None
    used = here.memory_allocated()
    with there.stopped():
        here.drop("ours")
        time.sleep(0.5)
        assert here.memory_allocated() == used
        assert here.registered() == 1
    assert settle(lambda: here.registered() == 0)
    assert settle(lambda: here.memory_allocated() < used)
