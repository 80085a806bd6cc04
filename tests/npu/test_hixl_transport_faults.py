# SPDX-License-Identifier: Apache-2.0
"""What the `hixl` transport does when its engine fails, and what it registers with it."""

from __future__ import annotations

import threading

import pytest

from tests.npu.hixl_pair import Pair, blocks, give, here, pair, peers, pull
from tests.peers import eventually

__all__ = ["here", "pair", "peers"]

pytestmark = pytest.mark.needs_simulated_npu


def test_memory_is_registered_with_the_engine_while_it_is_a_cache(pair: Pair):
    here, _, _ = pair

    def live():
        return here.calls("hixl.register_mem") - here.calls("hixl.deregister_mem")

    before = live()
    here.allocate("mine", 8, 2, 64, paged=True)
    assert live() == before + 1
    here.adopt("other", 3, 4, 512)
    assert live() == before + 2, "one storage, registered once"
    here.drop("mine")
    assert live() == before + 1
    here.drop("other")
    assert live() == before


@pytest.mark.parametrize(
    "pair", [{"pool": '{"memory_size": 8388608, "page_shift": 12}'}], indirect=True
)
def test_a_pool_is_registered_once(pair: Pair):
    here, _, _ = pair
    give(pair)
    assert here.calls("hixl.register_mem") == 1
    assert pull(here) is None
    here.drop("mine")
    assert here.calls("hixl.deregister_mem") == 0


def test_refused_registration(pair: Pair):
    here, _, _ = pair
    here.break_("hixl.register_mem", 103900)
    failure = here.attempt_to("allocate", "mine", 2, 4, 1000, paged=True)
    assert failure.status == "LLM_PARAM_INVALID"
    assert "register" in failure.text
    assert here.counters()["caches"] == 0
    here.allocate("mine", 2, 4, 1000, paged=True)


@pytest.mark.parametrize("pair", [{"timeout_ms": 300}], indirect=True)
def test_timeout(pair: Pair):
    here, _, _ = pair
    data = blocks(give(pair), 8, 4096)
    here.hang()
    failure = pull(here)
    assert (failure.kind, failure.status) == ("LLMTimeoutError", "LLM_TIMEOUT")
    assert here.calls("hixl.disconnect") == 1
    here.mend()
    # Nobody writes any more, and the link is as good as before.
    here.paint("mine", 0)
    assert here.rows("mine") == [[0] * 8] * 2
    assert pull(here) is None
    assert blocks(here.dump("mine"), 8, 4096)[1][5:] == data[1][:3]
    assert here.link_states() == {2: "linked"}
    assert here.counters()["leases"] == 0


def test_exhausted_resources(pair: Pair):
    here, _, _ = pair
    give(pair)
    here.break_("hixl.transfer_async", 203900, times=5)
    assert pull(here) is None
    assert here.calls("hixl.transfer_async") == 6


def test_a_failed_transfer(pair: Pair):
    here, _, _ = pair
    give(pair)
    here.break_("hixl.move", 503900)
    assert pull(here).status == "LLM_FAILED"
    assert pull(here) is None


def test_a_dropped_connection(pair: Pair):
    here, _, _ = pair
    give(pair)
    assert pull(here) is None
    here.break_("hixl.link", 503900)
    failure = pull(here)
    assert failure is None or failure.status in {"LLM_FAILED", "LLM_NOT_YET_LINK"}
    assert pull(here) is None


@pytest.mark.parametrize("pair", [{"timeout_ms": 500}], indirect=True)
def test_finalize_while_a_transfer_hangs(pair: Pair):
    here, there, _ = pair
    give(pair)
    here.hang()
    failures = []
    thread = threading.Thread(target=lambda: failures.append(pull(here)), daemon=True)
    thread.start()
    assert eventually(lambda: here.calls("hixl.transfer_async") == 1)
    here.finish()
    thread.join(30)
    assert [failure.status in {"LLM_TIMEOUT", "LLM_NOT_YET_LINK"} for failure in failures] == [True]
    assert eventually(lambda: there.call("counters")["leases"] == 0)
