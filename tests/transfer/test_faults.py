# SPDX-License-Identifier: Apache-2.0
"""Processes that die, sleep or free memory in the middle of a transfer (reference API, 11.5)."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey
from llm_datadist_torch.links.link import Pending
from llm_datadist_torch.values.deadline import Deadline
from tests.devices import examples, on_npu
from tests.peers import Peer, Ref, Service, eventually

Peers = Callable[[], Peer]
PEER, ME = 2, 1
KNE, NYL, TIMEOUT = "LLM_KV_CACHE_NOT_EXIST", "LLM_NOT_YET_LINK", "LLM_TIMEOUT"
FAILED = "LLM_FAILED"
OK = ("LLM_SUCCESS", ["LLM_SUCCESS"])
MINE, THEIRS = BlocksCacheKey(ME, 0), BlocksCacheKey(PEER, 0)
POOL = '{"memory_size": 67108864, "page_shift": 16}'
BLOCKS = list(range(64))
BIG = (4, 64, 65536)
"""Tensors, blocks and bytes of a block: 16 MiB."""

every_way = pytest.mark.parametrize(
    "way", ["allocated", "tensors", pytest.param("relay", marks=pytest.mark.host_memory_only)]
)


def transfer(
    service: Any, operation: str, key: BlocksCacheKey, name: str, ids: list[int], **further: Any
) -> Any:
    return service(operation, key, Ref(name), ids, ids, **further)


# -- death ----------------------------------------------------------------------------------------

ROLES = {
    # who works, what it does, whose cache it names
    "owner of a pull": ("here", "pull_blocks", THEIRS),
    "owner of a push": ("here", "push_blocks", THEIRS),
    "puller": ("there", "pull_blocks", MINE),
    "pusher": ("there", "push_blocks", MINE),
}


@every_way
def test_sigkill_at_random_points(here: Service, peers: Peers, way: str) -> None:
    seed = int(os.environ.get("LLMDD_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"seed {seed}")
    rng = random.Random(seed)
    port = here.start(ME, pool=POOL)
    here.allocate("mine", *BIG, paged=True, keys=MINE)
    at_rest = here.counters(), here.pool_stats()
    files = 0
    with ThreadPoolExecutor(1) as pool:
        for round_ in range(len(ROLES) * examples(3)):
            role = list(ROLES)[round_ % 4]
            who, operation, key = ROLES[role]
            peer = peers()
            peer.call("start", PEER)
            peer.call("make", "allocated" if way == "relay" else way, "theirs", *BIG, paged=True,
                     keys=THEIRS)  # fmt: skip
            assert peer.call("link", ME, port) == OK, (round_, role)
            if way == "relay":
                here.only_relay(PEER)
                peer.call("only_relay", ME)
            if who == "here":
                work = pool.submit(here.hammer, operation, key, Ref("mine"), BLOCKS, BLOCKS)
            else:
                peer.begin("hammer", operation, key, Ref("theirs"), BLOCKS, BLOCKS)
            time.sleep(rng.random() * 0.04)
            peer.kill()
            if who == "here":
                _, failure = work.result(60)
                assert failure is not None, (round_, role)
                # An engine may notice before the link does.
                noticed = {NYL, FAILED} if on_npu() else {NYL}
                assert failure.status in noticed, (round_, role, failure)
            # Whatever was under way: the next call says what happened, and nothing is held.
            assert eventually(lambda: here.link_states() == {PEER: "lost"}), (round_, role)
            failure = transfer(here.attempt, "pull_blocks", THEIRS, "mine", [0])
            assert failure.kind == "LLMPeerLostError", (round_, role, failure)
            assert eventually(lambda: (here.counters(), here.pool_stats()) == at_rest), role
            peer.close()
            files = files or here.resources()["fds"]
    assert here.unlink(PEER, force=True) == OK
    assert eventually(lambda: here.resources()["fds"] <= files + 1), (files, here.resources())


def test_peer_leaves_without_goodbye(here: Service, peers: Peers) -> None:
    here.start(ME)
    here.allocate("mine", 2, 4, 64, paged=True)
    peer = peers()
    assert here.link(PEER, peer.call("start", PEER)) == OK
    peer.begin("leave")
    assert eventually(lambda: here.link_states() == {PEER: "lost"})
    assert transfer(here.attempt, "pull_blocks", THEIRS, "mine", [0]).status == NYL


# -- sleep ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialer", ["here", "there"])
def test_sleeping_owner(here: Service, peers: Peers, dialer: str) -> None:
    port = here.start(ME, timeout_ms=300)
    peer = peers()
    port_there = peer.call("start", PEER)
    linked = here.link(PEER, port_there) if dialer == "here" else peer.call("link", ME, port)
    assert linked == OK
    peer.call("allocate", "theirs", 2, 4, 64, paged=True, keys=THEIRS)
    peer.call("paint", "theirs", 5)
    here.allocate("mine", 2, 4, 64, paged=True)
    for _ in range(3):
        with peer.stopped():
            started = time.monotonic()
            assert transfer(here.attempt, "pull_blocks", THEIRS, "mine", [0]).status == TIMEOUT
            assert time.monotonic() - started < 10
            assert here.link_states() == {PEER: "linked"}
        # Awake again, it first grants the lease that nobody waits for any more: that comes back.
        ids = BLOCKS[:4]
        awake = transfer(here.attempt, "pull_blocks", THEIRS, "mine", ids, timeout=10_000)
        assert awake is None
        assert here.colours("mine") == [5]
        assert eventually(
            lambda: not any(peer.call("counters")[name] for name in ("leases", "grants"))
        )
    peer.call("drop", "theirs")
    assert eventually(lambda: peer.call("counters")["caches"] == 0)


@every_way
def test_sleep_at_random_points(here: Service, peers: Peers, way: str) -> None:
    rng = random.Random(7)
    here.start(ME, timeout_ms=400)
    peer = peers()
    assert here.link(PEER, peer.call("start", PEER)) == OK
    peer.call(
        "make", "allocated" if way == "relay" else way, "theirs", *BIG, paged=True, keys=THEIRS
    )
    if way == "relay":
        here.only_relay(PEER)
    here.allocate("mine", *BIG, paged=True)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            work = pool.submit(
                here.hammer, "pull_blocks", THEIRS, Ref("mine"), BLOCKS, BLOCKS, seconds=20
            )
            time.sleep(rng.random() * 0.05)
            with peer.stopped():
                _, failure = work.result(30)
            assert failure is not None
            assert failure.status == TIMEOUT
            assert transfer(here.attempt, "pull_blocks", THEIRS, "mine", [1]) is None
            assert eventually(lambda: peer.call("counters")["leases"] == 0)
    assert here.counters()["leases"] == 0


def test_an_answer_in_the_last_moment_is_not_lost(
    here: Service, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease arrives between the end of the wait and the end of the request."""
    here.start(ME)
    peer = peers()
    assert here.link(PEER, peer.call("start", PEER)) == OK
    peer.call("allocate", "theirs", 2, 4, 64, paged=True, keys=THEIRS)
    here.allocate("mine", 2, 4, 64, paged=True)
    wait = Pending.wait

    def too_early(self: Pending, deadline: Deadline) -> Any:
        answer = wait(self, Deadline.after_ms(0))
        time.sleep(0.2)
        return answer

    monkeypatch.setattr(Pending, "wait", too_early)
    assert transfer(here.attempt, "pull_blocks", THEIRS, "mine", [0]) is None
    monkeypatch.undo()
    assert eventually(lambda: peer.call("counters")["leases"] == 0)


# -- time is up -----------------------------------------------------------------------------------


@every_way
def test_nothing_is_written_after_a_timeout(here: Service, peers: Peers, way: str) -> None:
    here.start(ME, timeout_ms=3)
    peer = peers()
    assert here.link(PEER, peer.call("start", PEER)) == OK
    shape = (8, 64, 1 << 19)  # 256 MiB
    kind = "allocated" if way == "relay" else way
    peer.call("make", kind, "theirs", *shape, paged=True, keys=THEIRS)
    here.allocate("mine", *shape, paged=True)
    if way == "relay":
        here.only_relay(PEER)
    for colour in (1, 2):
        # On a busy machine all may have landed before the time is looked at: then it is a success.
        for _ in range(10):
            peer.call("paint", "theirs", colour)
            failure = transfer(here.attempt, "pull_blocks", THEIRS, "mine", BLOCKS)
            if failure is not None:
                break
            assert here.all_are("mine", colour)
        assert failure is not None
        assert failure.status == TIMEOUT
        tensors = here.held["mine"].cache.tensors
        sums = [int(tensor.view(-1)[::4096].cpu().sum()) for tensor in tensors]
        time.sleep(0.1)
        assert [int(tensor.view(-1)[::4096].cpu().sum()) for tensor in tensors] == sums
    # The link still works, for a call that has the time that a busy machine takes.
    assert here.attempt("pull_blocks", THEIRS, Ref("mine"), [3], [3], timeout=10_000) is None
    assert here.held["mine"].cache.block(3)[0].cpu().unique().tolist() == [2]
    assert eventually(lambda: peer.call("counters")["leases"] == 0)


# -- caches that end meanwhile --------------------------------------------------------------------


def pulling_slowly(here: Service, peer: Peer) -> None:
    """The peer has a lease on our cache, and takes its time."""
    peer.call("slow_moves", 0.5)
    peer.begin("attempt", "pull_blocks", MINE, Ref("theirs"), [0, 1], [0, 1])
    assert eventually(lambda: here.counters()["leases"] == 1)


@pytest.fixture
def slow(here: Service, peers: Peers) -> Peer:
    port = here.start(ME, timeout_ms=100)
    peer = peers()
    peer.call("start", PEER)
    assert peer.call("link", ME, port) == OK
    peer.call("allocate", "theirs", 2, 2, 64, paged=True)
    return peer


def test_deallocate_during_a_pull(here: Service, slow: Peer) -> None:
    here.allocate("mine", 2, 2, 64, paged=True, keys=MINE)
    here.paint("mine", 9)
    pulling_slowly(here, slow)
    here.drop("mine")
    assert here.counters() == {"caches": 1, "keys": 0, "leases": 1, "grants": 1}
    # Nobody new gets in.
    here.allocate("mine", 2, 2, 64, paged=True)
    here.paint("mine", 4)
    assert slow.answer() is None
    assert slow.call("colours", "theirs") == [9]
    assert eventually(lambda: here.counters() == {"caches": 1, "keys": 0, "leases": 0, "grants": 0})
    assert slow.call("attempt", "pull_blocks", MINE, Ref("theirs"), [0], [0]).status == KNE


def test_unregister_waits_for_a_pull(here: Service, slow: Peer) -> None:
    cache_id = here.register("mine", 2, 2, 64, paged=True, keys=MINE)
    here.paint("mine", 9)
    pulling_slowly(here, slow)
    failure = here.attempt("unregister_cache", cache_id)
    assert failure is not None
    assert failure.status == TIMEOUT
    assert not here.held["mine"].cache.ended
    assert slow.answer() is None
    assert slow.call("colours", "theirs") == [9]
    assert here.attempt("unregister_cache", cache_id) is None
    assert here.held["mine"].cache.ended
    assert here.counters()["caches"] == 0


@pytest.mark.parametrize("end", ["finalize", "force"])
def test_a_pull_does_not_succeed_without_its_lease(here: Service, slow: Peer, end: str) -> None:
    """The owner has ended the link alone, and may have used its memory for something else."""
    here.allocate("mine", 2, 2, 64, paged=True, keys=MINE)
    pulling_slowly(here, slow)
    if end == "finalize":
        here.finish()
    else:
        assert here.unlink(PEER, None, 100, force=True) == OK
    failure = slow.answer()
    assert failure is not None
    assert failure.status == NYL


# -- memory that its user frees too early ---------------------------------------------------------


@pytest.mark.parametrize("way", ["process-memory", "relay"])
def test_peer_has_freed_registered_memory(here: Service, peers: Peers, way: str) -> None:
    here.start(ME, device="cpu")
    peer = peers()
    assert here.link(PEER, peer.call("start", PEER, device="cpu")) == OK
    peer.call("register", "theirs", 2, 4, 4096, paged=True, keys=THEIRS, ints=True)
    here.allocate("mine", 2, 4, 4096, paged=True)
    if way == "relay":
        here.only_relay(PEER)
    assert transfer(here.attempt, "pull_blocks", THEIRS, "mine", [0, 1]) is None
    peer.call("pull_the_rug", "theirs")
    for operation in ("pull_blocks", "push_blocks"):
        failure = transfer(here.attempt, operation, THEIRS, "mine", [0, 1])
        assert failure is not None
        assert failure.status == KNE
    peer.call("allocate", "other", 2, 4, 4096, paged=True, keys=BlocksCacheKey(PEER, 1))
    assert transfer(here.attempt, "pull_blocks", BlocksCacheKey(PEER, 1), "mine", [0]) is None


def test_own_or_near_registered_memory_is_freed(here: Service, services: Any) -> None:
    """In one process nobody but us can prevent a crash."""
    here.start(ME, device="cpu")
    near = services()
    assert here.link(PEER, near.start(PEER, device="cpu")) == OK
    near.register("theirs", 2, 4, 4096, paged=True, keys=THEIRS, ints=True)
    here.allocate("mine", 2, 4, 4096, paged=True)
    here.register("foreign", 2, 4, 4096, paged=True, ints=True)
    for name in ("mine", "foreign"):
        assert transfer(here.attempt, "pull_blocks", THEIRS, name, [0]) is None
    here.pull_the_rug("foreign")
    for operation in ("pull_blocks", "push_blocks"):
        failure = transfer(here.attempt, operation, THEIRS, "foreign", [0])
        assert failure.status == "LLM_PARAM_INVALID"
    near.pull_the_rug("theirs")
    for operation in ("pull_blocks", "push_blocks"):
        assert transfer(here.attempt, operation, THEIRS, "mine", [0]).status == KNE


@pytest.mark.parametrize("way", ["process-memory", "relay"])
def test_peer_frees_registered_memory_during_a_pull(here: Service, peers: Peers, way: str) -> None:
    rng = random.Random(3)
    here.start(ME, device="cpu")
    here.allocate("mine", *BIG, paged=True)
    peer = peers()
    assert here.link(PEER, peer.call("start", PEER, device="cpu")) == OK
    if way == "relay":
        here.only_relay(PEER)
    for round_ in range(10):
        key, name = BlocksCacheKey(PEER, round_), f"c{round_}"
        peer.call("register", name, *BIG, paged=True, keys=key, ints=True)
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(here.hammer, "pull_blocks", key, Ref("mine"), BLOCKS, BLOCKS)
            time.sleep(rng.random() * 0.02)
            peer.call("pull_the_rug", name)
            _, failure = work.result(60)
        assert failure is not None
        assert failure.status == KNE, failure
