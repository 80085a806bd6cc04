# SPDX-License-Identifier: Apache-2.0
"""Descriptors, mappings, threads and leases do not grow; the end of an instance disturbs nobody."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey, CacheKeyByIdAndIndex, LLMException
from llm_datadist_torch.transports.choice import LinkChannel
from tests.devices import on_npu
from tests.peers import Ref, Service, eventually
from tests.transfer.helpers import OK, Peers

PEER, ME = 2, 1
MINE, THEIRS = BlocksCacheKey(ME, 0), BlocksCacheKey(PEER, 0)


def transfer(service: Any, operation: str, key: BlocksCacheKey, name: str, ids: list[int]) -> Any:
    return service(operation, key, Ref(name), ids, ids)


@pytest.mark.host_memory_only
def test_reaching_the_memory_of_a_process_takes_no_descriptor(
    here: Service, peers: Peers, paths: list[str]
) -> None:
    """It is known by the pidfd that its connection has already."""
    here.start(ME)
    peer = peers()
    assert here.link(PEER, peer.call("start", PEER)) == OK
    peer.call("register", "theirs", 1, 4, 4096, paged=True, keys=THEIRS, accessible=True)
    here.allocate("mine", 1, 4, 4096, paged=True)
    before = here.resources()["fds"]
    assert here.attempt("pull_blocks", THEIRS, Ref("mine"), [0], [0]) is None
    assert paths == ["process-memory"]
    assert here.resources()["fds"] == before


def assert_no_leak(
    work: Callable[[], None], at_rest: Callable[[], list[dict[str, int]]], spare: int = 0
) -> None:
    """Some work leaves nothing behind.

    An allocator takes one more segment when two buffers first meet, whenever that is; a leak is
    there each time.
    """

    def growth() -> tuple[Any, Any] | None:
        before = at_rest()
        work()

        def none() -> bool:
            return all(
                now[name] <= then[name] + (8 if name == "maps" else spare)
                for now, then in zip(at_rest(), before, strict=True)
                for name in then
            )

        return None if eventually(none) else (before, at_rest())

    seen = [growth()]
    while seen[-1] is not None and len(seen) < 3:
        seen.append(growth())
    assert seen[-1] is None, seen


@pytest.mark.parametrize("mover", ["here", "there"])
def test_two_hundred_caches_leave_nothing(here: Service, peers: Peers, mover: str) -> None:
    gc.collect()  # what other tests of this process left behind
    at_first = here.resources()["shared"] if mover == "here" else 0
    port = here.start(ME)
    peer = peers()
    peer.call("start", PEER)
    assert peer.call("link", ME, port) == OK

    def local(name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(here, name)(*args, **kwargs)

    work, own = (local, peer.call) if mover == "here" else (peer.call, local)
    owner = PEER if mover == "here" else ME
    work("allocate", "dst", 2, 4, 4096, paged=False)

    def rounds(count: int) -> None:
        for _ in range(count):
            cache_id = own("allocate", "src", 2, 4, 4096, paged=False)
            key = CacheKeyByIdAndIndex(owner, cache_id, 1)
            assert work("attempt", "pull_cache", key, Ref("dst")) is None
            own("drop", "src")

    def at_rest() -> Any:
        return [{**side("resources"), **side("counters")} for side in (work, own)]

    rounds(20)
    # The counters of both sides, and the destination; what the owner freed is unmapped.
    shared = 2 if on_npu() else 3
    assert eventually(lambda: work("resources")["shared"] - at_first == shared)
    assert eventually(lambda: own("counters")["caches"] == 0)

    assert_no_leak(lambda: rounds(200), at_rest)


def test_a_hundred_links_leave_nothing(here: Service, peers: Peers) -> None:
    port = here.start(ME)
    here.allocate("mine", 2, 4, 4096, paged=True, keys=MINE)
    peer = peers()
    port_there = peer.call("start", PEER)
    peer.call("allocate", "theirs", 2, 4, 4096, paged=True)

    def rounds(count: int) -> None:
        for at in range(count):
            assert (here.link(PEER, port_there) if at % 2 else peer.call("link", ME, port)) == OK
            assert (
                transfer(
                    lambda *args: peer.call("attempt", *args), "pull_blocks", MINE, "theirs", [0]
                )
                is None
            )
            assert (
                here.unlink(PEER, port_there) if at % 4 < 2 else peer.call("unlink", ME, port)
            ) == OK
            assert eventually(lambda: not here.link_states() and not peer.call("link_states"))

    def resources() -> list[dict[str, int]]:
        return [here.resources(), peer.call("resources")]

    rounds(12)
    time.sleep(0.3)
    assert_no_leak(lambda: rounds(100), resources, spare=1)


def test_a_closed_instance_writes_to_no_descriptor(here: Service) -> None:
    """The number of its wake-up descriptor belongs to somebody else by then."""
    here.start(ME)
    endpoint = here.instance.links.endpoint
    number = endpoint.loop._wake
    here.dd.finalize()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        if other != number:
            os.dup2(other, number)
        endpoint.connect(endpoint.new_connection(), "127.0.0.1", 1)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
    finally:
        os.close(other)
        if other != number:
            os.close(number)


def pull_until_it_fails(manager: Any, cache: Any, errors: list[BaseException]) -> None:
    try:
        while True:
            manager.pull_blocks(THEIRS, cache, [0, 1], [2, 3])
    except Exception as error:  # noqa: BLE001
        errors.append(error)


def test_finalize_during_pulls(here: Service, services: Any) -> None:
    """Pulls that run while the instance ends get typed errors, and everything ends."""
    for _ in range(10):
        near = services()
        port = near.start(PEER)
        near.allocate("theirs", 2, 4, 4096, paged=True, keys=THEIRS)
        here.start(ME)
        here.allocate("mine", 2, 4, 4096, paged=True)
        assert here.link(PEER, port) == OK
        errors: list[BaseException] = []
        arguments = (here.manager, here.held["mine"].cache, errors)
        threads = [threading.Thread(target=pull_until_it_fails, args=arguments) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        here.finish()
        for thread in threads:
            thread.join(30)
        assert len(errors) == 3
        for error in errors:
            assert isinstance(error, LLMException), error
        near.finish()


def test_ways_recorder_sees_moves(here: Service, services: Any, paths: list[str]) -> None:
    """The fixture that other tests rely on sees what LinkChannel does."""
    here.start(ME)
    near = services()
    assert here.link(PEER, near.start(PEER)) == OK
    near.allocate("theirs", 1, 2, 64, paged=True, keys=THEIRS)
    here.allocate("mine", 1, 2, 64, paged=True)
    assert transfer(here.attempt, "pull_blocks", THEIRS, "mine", [0]) is None
    assert paths == ["same-process"]
    assert LinkChannel.move.__name__ == "recorded"
