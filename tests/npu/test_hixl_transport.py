# SPDX-License-Identifier: Apache-2.0
"""Pulls and pushes between the NPUs of two processes, through the `hixl` transport."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
import torch

from llm_datadist_torch import BlocksCacheKey, CacheKey, Placement
from llm_datadist_torch.transports.hixl.native import NativeLibrary
from llm_datadist_torch.transports.hixl.ports import describe
from tests.npu.hixl_pair import KEY, MINE, OK, Pair, blocks, give, here, pair, peers, pull
from tests.npu.npu_service import NpuService, without_library
from tests.peers import Peer, Ref, eventually

__all__ = ["here", "pair", "peers"]

pytestmark = pytest.mark.needs_hixl
BACKEND = {"llm.TransferBackend": "hixl"}
both_modes = pytest.mark.parametrize(
    "pair", [{}, {"remote": True}], indirect=True, ids=["two-sided", "remote"]
)


def test_device_memory_goes_by_hixl_and_host_memory_stays_local(pair: Pair):
    here, there, _ = pair
    assert here.transports(2) == there.call("transports", 1) == ("local", "hixl")
    here.allocate("mine", 1, 2, 64, paged=True)
    assert here.device("mine") == "npu:0"


@both_modes
def test_pull_blocks(pair: Pair):
    here, _, _ = pair
    source = blocks(give(pair), 8, 4096)
    order = random.Random(3).sample(range(8), 8)
    assert pull(here, order, range(8)) is None
    mine = blocks(here.dump("mine"), 8, 4096)
    assert mine == [[tensor[row] for row in order] for tensor in source]


@both_modes
def test_pull_cache(pair: Pair):
    here, there, _ = pair
    there.call("allocate", "theirs", 4, 2, 6000, paged=False, keys=(CacheKey(2, 0), CacheKey(2, 1)))
    data = blocks(there.call("fill", "theirs", 9), 2, 6000)
    here.allocate("mine", 4, 3, 6000, paged=False)
    here.paint("mine", 0)
    assert here.attempt("pull_cache", CacheKey(2, 1), MINE, 2) is None
    mine = blocks(here.dump("mine"), 3, 6000)
    empty = bytes(6000)
    assert mine == [[empty, empty, tensor[1]] for tensor in data]


@pytest.mark.parametrize("pair", [{"options": {"llm.Transport": "hixl"}}], indirect=True)
def test_host_memory_by_hixl(pair: Pair):
    """As between machines, where `local` has no good way."""
    here, there, _ = pair
    assert here.transports(2) == ("hixl", "hixl")
    there.call("allocate", "theirs", 2, 4, 1000, paged=True, keys=KEY, placement=Placement.HOST)
    there.call("paint", "theirs", 9)
    here.allocate("mine", 2, 4, 1000, paged=True, placement=Placement.HOST)
    here.paint("mine", 1)
    assert pull(here, [0, 1], [3, 0]) is None
    assert here.rows("mine") == [[9, 1, 1, 9]] * 2
    here.allocate("device", 2, 4, 1000, paged=True)
    assert here.attempt("pull_blocks", KEY, Ref("device"), [0, 1, 2, 3], [0, 1, 2, 3]) is None
    assert here.rows("device") == [[9] * 4] * 2


def test_the_peer_comes_back_as_a_new_process(pair: Pair, peers: Callable[[], Peer]):
    here, there, port = pair
    give(pair)
    assert pull(here) is None
    there.kill()
    assert eventually(lambda: here.link_states() == {2: "lost"})
    second = peers()
    # The engine of the new process may have the very address that the old one had.
    assert second.call("start", 2, listen=f"127.0.0.1:{port}") == port
    second.call("allocate", "theirs", 2, 8, 4096, paged=True, keys=KEY)
    second.call("paint", "theirs", 5)
    here.unlink(2, force=True)
    assert here.link(2, port) == OK
    assert pull(here, range(8), range(8)) is None
    assert here.rows("mine") == [[5] * 8] * 2


def test_two_instances_of_one_process_need_no_engine(here: NpuService):
    other = NpuService()
    port = other.start(2)
    try:
        here.start(1)
        assert here.link(2, port) == OK
        assert here.transports(2) == ("local", "local")
        other.allocate("theirs", 2, 8, 4096, paged=True, keys=KEY)
        other.paint("theirs", 8)
        here.allocate("mine", 2, 8, 4096, paged=True)
        here.paint("mine", 0)
        assert pull(here) is None
        assert here.rows("mine") == [[0, 0, 0, 0, 0, 8, 8, 8]] * 2
    finally:
        other.finish()


def test_the_library_is_used_where_there_is_one():
    assert "the class hixl::Hixl of /" in describe()


def test_through_the_python_module(
    here: NpuService, peers: Callable[[], Peer], monkeypatch: pytest.MonkeyPatch
):
    """One side through the module, the other through the class."""
    monkeypatch.setattr(NativeLibrary, "load", classmethod(without_library))
    assert re.search("the Python module hixl of .*, because .* the test hides it", describe())
    there = peers()
    port = there.call("start", 2)
    here.start(1)
    assert here.link(2, port) == OK
    data = blocks(give((here, there, port), 3000, 64), 3000, 64)
    here.allocate("ours", 2, 8, 4096, paged=True, keys=BlocksCacheKey(1, 0))
    order = random.Random(8).sample(range(3000), 3000)
    assert pull(here, order, range(3000)) is None
    assert blocks(here.dump("mine"), 3000, 64) == [[tensor[r] for r in order] for tensor in data]
    assert here.calls("hixl.transfer_async") == 3  # of 2048 descriptors at most


# -- choosing it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [{"remote": True, "options": BACKEND}], indirect=True)
def test_the_references_backend(pair: Pair):
    here, _, _ = pair
    assert here.transports(2) == ("hixl", "hixl")
    give(pair)
    assert pull(here) is None


@pytest.mark.parametrize("pair", [{"remote": True, "options": BACKEND}], indirect=True)
def test_with_the_references_backend_each_side_asks(pair: Pair):
    here, there, port = pair
    back = here.dd.listen_address[1]
    assert there.call("link", 1, back) == OK
    assert there.call("link", 1, back)[0] == here.link(2, port)[0] == "LLM_ALREADY_LINK"
    assert here.link(1, back)[0] == "LLM_PARAM_INVALID"
    assert here.unlink(2) == OK
    assert there.call("unlink", 1) == OK
    assert here.link_states() == there.call("link_states") == {}


@pytest.mark.parametrize("listen", [None, "0.0.0.0:0"])
def test_an_instance_without_an_address_has_an_engine_too(
    here: NpuService, peers: Callable[[], Peer], listen: str | None
):
    """A decoder that only dials: it pulls and is pushed to."""
    there = peers()
    port = there.call("start", 2)
    here.start(1, listen=listen, options={"llm.Transport": "hixl"})
    assert here.link(2, port) == OK
    assert here.transports(2) == ("hixl", "hixl")
    here.allocate("ours", 2, 8, 4096, paged=True, keys=BlocksCacheKey(1, 0))
    here.paint("ours", 0)
    source = blocks(give((here, there, port)), 8, 4096)
    assert pull(here, range(8), range(8)) is None
    assert blocks(here.dump("mine"), 8, 4096) == source
    push = ("push_blocks", BlocksCacheKey(1, 0), Ref("theirs"), [2], [3])
    assert there.call("attempt", *push) is None
    assert [tensor[3] for tensor in blocks(here.dump("ours"), 8, 4096)] == [
        tensor[2] for tensor in source
    ]


@pytest.mark.needs_two_npus
@pytest.mark.parametrize("pair", [{"options": {"ge.exec.deviceId": "1"}}], indirect=True)
def test_on_another_device_than_the_current_one(pair: Pair):
    here, _, _ = pair
    before = torch.npu.current_device()
    data = blocks(give(pair), 8, 4096)
    assert here.device("mine") == "npu:1"
    assert pull(here) is None
    assert blocks(here.dump("mine"), 8, 4096)[0][5:] == data[0][:3]
    assert torch.npu.current_device() == before == 0
