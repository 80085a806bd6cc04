# SPDX-License-Identifier: Apache-2.0
"""Remote-accessible mode: a pull whose cache is known asks nobody, and never gets stale bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from llm_datadist_torch import _C, BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.links import known_caches
from llm_datadist_torch.links.known_caches import KnownCaches
from llm_datadist_torch.memory import device_copies
from llm_datadist_torch.transports.hixl.channel import HixlChannel
from tests.peers import Peer, Ref, Service, eventually
from tests.transfer.helpers import OK, Peers, Services
from tests.transfer.remote import BLOCKS, ME, PEER, SIZE, THEIRS, messages, pull, status

POOL = '{"memory_size": 65536, "page_shift": 12}'


@pytest.fixture
def peer(remote_peer: Peer) -> Peer:
    return remote_peer


@contextmanager
def just_after_the_bytes(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]
) -> Iterator[None]:
    """The first movement meanwhile is followed by ``action``, before anybody can check anything."""
    move, copy, by_engine, left = _C.move_mapped, _C.copy_runs, HixlChannel.move, [action]
    on_device = device_copies.copy_runs

    def act() -> None:
        if left:
            left.pop()()

    def moved(*args: Any) -> int:
        *whole, counters, leased, lookup, memory = args
        nothing = [*whole[:3], whole[3][:0], *whole[4:]]
        state = move(*nothing, counters, leased, lookup, memory) or move(*whole)
        act()
        # The second look at the counters; the first has been taken.
        return state or move(*nothing, counters, True, lookup, memory)

    def copied(*args: Any) -> int:
        done = copy(*args)
        act()
        return done

    def copied_on_device(*args: Any) -> int:
        done = on_device(*args)
        act()
        return done

    def moved_by_engine(*args: Any) -> str:
        path = by_engine(*args)
        act()
        return path

    with monkeypatch.context() as patch:
        patch.setattr(_C, "move_mapped", moved)
        patch.setattr(_C, "copy_runs", copied)  # within one process
        patch.setattr(device_copies, "copy_runs", copied_on_device)
        patch.setattr(HixlChannel, "move", moved_by_engine)
        yield
    assert not left


# On an NPU only memory of a pool tells peers that torch has moved it; other owners are asked.
@pytest.mark.host_memory_only
def test_only_the_first_pull_asks(
    here: Service, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with messages(monkeypatch) as said:
        assert pull(here) is None
        assert said == ["Resolve", "Release"]
        peer.call("paint", "theirs", 8)
        said.clear()
        # The owner sleeps: nothing but its memory can answer.
        with peer.stopped():
            assert pull(here) is None
            assert here.colours("mine") == [8]
        assert said == []


def test_every_other_key_and_pushes_ask(
    here: Service, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_id = CacheKeyByIdAndIndex(PEER, peer.call("cache_id", "theirs"), 0)
    with messages(monkeypatch) as said:
        for _ in range(2):
            assert here.attempt("push_blocks", THEIRS, Ref("mine"), BLOCKS, BLOCKS) is None
        assert said == ["Resolve", "Release"] * 2
        assert pull(here) is None
        assert pull(here, by_id).status == "LLM_PARAM_INVALID"  # an id means a contiguous cache


def test_two_sided_pulls_always_ask(
    here: Service, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.start(ME)
    other = peers()
    assert here.link(PEER, other.call("start", PEER)) == OK
    here.allocate("mine", *SIZE, paged=True)
    other.call("allocate", "theirs", *SIZE, paged=True, keys=THEIRS)
    with messages(monkeypatch) as said:
        assert pull(here) is None
        assert pull(here) is None
    assert said == ["Resolve", "Release"] * 2


@pytest.mark.parametrize("kind", ["allocated", "tensors", "ints"])
def test_an_ended_cache_is_not_read(here: Service, peer: Peer, kind: str) -> None:
    key = BlocksCacheKey(PEER, 1)
    peer.call("make", kind, "other", *SIZE, paged=True, keys=key)
    peer.call("paint", "other", 9)
    for _ in range(2):
        assert pull(here, key) is None
    here.paint("mine", 1)
    peer.call("drop", "other")
    assert status(pull(here, key)) == "LLM_KV_CACHE_NOT_EXIST"
    assert here.colours("mine") == [1]


@pytest.mark.parametrize("kind", ["allocated", "tensors", "ints"])
def test_the_key_of_another_cache_now(here: Service, peer: Peer, kind: str) -> None:
    key = BlocksCacheKey(PEER, 1)
    for colour in (9, 10, 11):
        peer.call("make", kind, "other", *SIZE, paged=True, keys=key)
        peer.call("paint", "other", colour)
        for _ in range(2):
            assert pull(here, key) is None
            assert here.colours("mine") == [colour]
        peer.call("drop", "other")


def test_rows_and_removed_keys(here: Service, peer: Peer) -> None:
    keys = (CacheKey(PEER, req_id=5), CacheKey(PEER, req_id=6))
    peer.call("allocate", "rows", 2, 2, 4096, paged=False, keys=keys)
    peer.call("paint", "rows", 3)
    by_id = CacheKeyByIdAndIndex(PEER, peer.call("cache_id", "rows"), 1)
    here.allocate("row", 2, 1, 4096, paged=False)
    for key in (*keys, by_id) * 2:
        assert here.attempt("pull_cache", key, Ref("row")) is None
        assert here.colours("row") == [3]
    peer.call("run", "remove_cache_key", keys[0])
    gone = here.attempt("pull_cache", keys[0], Ref("row"))
    assert gone.status == "LLM_KV_CACHE_NOT_EXIST"
    for key in (keys[1], by_id):
        assert here.attempt("pull_cache", key, Ref("row")) is None
    # The key that is left keeps the cache, until it goes as well.
    peer.call("drop", "rows")
    for key in (keys[1], by_id):
        assert here.attempt("pull_cache", key, Ref("row")) is None
    peer.call("run", "remove_cache_key", keys[1])
    for key in (keys[1], by_id):
        gone = here.attempt("pull_cache", key, Ref("row"))
        assert gone.status == "LLM_KV_CACHE_NOT_EXIST"


@pytest.mark.parametrize("remote", [False, True])
def test_memory_that_is_freed_while_it_is_read(
    here: Service, services: Services, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    """In a pool the next cache gets the same pages at once, unless a lease keeps them."""
    other = services()
    here.start(ME, remote=remote)
    assert here.link(PEER, other.start(PEER, remote=remote, pool=POOL)) == OK
    here.allocate("mine", *SIZE, paged=True)
    other.allocate("theirs", *SIZE, paged=True, keys=THEIRS)
    other.paint("theirs", 7)
    assert pull(here) is None
    # The lease comes back a moment later; until then nothing is freed.
    assert eventually(lambda: other.counters()["leases"] == 0)

    def free_and_reuse() -> None:
        if not remote:
            # Two-sided pulls have a lease; it ends when the owner ends the link.
            for link in other.instance.links.links():
                other.instance.links._owner.end_grants(link)
        other.drop("theirs")
        other.allocate("others", *SIZE, paged=True)
        other.paint("others", 99)

    read = set(other.held["theirs"].cache.tensor_addrs)
    with just_after_the_bytes(monkeypatch, free_and_reuse):
        failure = pull(here)
    if failure is None:
        # Only where the owner is asked, as for memory of an NPU, does a lease keep the bytes.
        assert here.held["mine"].cache.tensors[0].device.type != "cpu"
        assert read.isdisjoint(other.held["others"].cache.tensor_addrs)
        assert here.colours("mine") == [7]
    else:
        assert status(failure) == "LLM_KV_CACHE_NOT_EXIST"


def test_one_piece_of_memory_under_changing_keys(here: Service, peer: Peer) -> None:
    """Whatever is pulled by key k is k: never what the memory was before, or became after."""
    keys, stop = 2, threading.Event()
    here.allocate("sixteen", 1, 16, 1 << 16, paged=True)
    blocks = list(range(16))
    seen: dict[str, int] = {}

    def read() -> None:
        count = 0
        while not stop.is_set():
            model = count % keys
            count += 1
            key = BlocksCacheKey(PEER, model)
            here.paint("sixteen", 200)
            failure = here.attempt("pull_blocks", key, Ref("sixteen"), blocks, blocks)
            if failure is None:
                assert here.colours("sixteen") == [model]
            seen[status(failure)] = seen.get(status(failure), 0) + 1

    peer.call("drop", "theirs")
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        try:
            peer.call("churn", keys, 400)
        finally:
            stop.set()
        reader.result(30)
    assert set(seen) == {"LLM_SUCCESS", "LLM_KV_CACHE_NOT_EXIST"}


def test_a_wrong_request_is_refused_by_what_is_known(here: Service, peer: Peer) -> None:
    assert pull(here) is None
    failure = here.attempt("pull_blocks", THEIRS, Ref("mine"), [4], [0])
    assert failure.status == "LLM_PARAM_INVALID"
    assert pull(here) is None


def test_a_link_made_anew_knows_nothing(here: Service, peer: Peer) -> None:
    assert pull(here) is None
    link = here.instance.links.find(PEER)
    assert len(link.known) == 1
    port = peer.call("finish") or peer.call("start", PEER, remote=True)
    assert here.unlink(PEER, force=True) == OK
    assert here.link(PEER, port) == OK
    assert len(here.instance.links.find(PEER).known) == 0
    assert status(pull(here)) == "LLM_KV_CACHE_NOT_EXIST"


def test_those_asked_for_longest_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_caches, "MAX_KNOWN", 2)
    known = KnownCaches()
    queries: list[Any] = [("request", number, 0, None) for number in range(3)]
    for query in (*queries[:2], queries[0], queries[2]):
        known.remember(query, query[1])
    assert [known.get(query) for query in queries] == [0, None, 2]


def test_memory_of_the_users_is_asked_for_each_time(
    here: Service, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch tells nobody that it moved a tensor, so only its owner knows where it is."""
    key = BlocksCacheKey(PEER, 1)
    peer.call("register", "given", *SIZE, paged=True, keys=key)
    peer.call("paint", "given", 5)
    with messages(monkeypatch) as said:
        for _ in range(2):
            assert pull(here, key) is None
        assert said == ["Resolve", "Release"] * 2
    assert here.colours("mine") == [5]
    peer.call("move_tensor", "given", "data", 0)
    assert "has moved" in pull(here, key).text
