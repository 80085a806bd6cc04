# SPDX-License-Identifier: Apache-2.0
"""Who is alive: the kernel says so. Peers that only don't answer keep their links."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey, LLMConfig
from llm_datadist_torch.links.table import LinkTable
from tests.faults.helpers import (
    ME,
    OK,
    PEER,
    TIMEOUT,
    Peers,
    events_of,
    kinds,
    pull,
    start_here,
    start_peer,
)
from tests.peers import Peer, Ref, Service, eventually

POOL = '{"memory_size": 131072, "page_shift": 16}'
"""Room for the two tensors of one cache."""


@pytest.fixture(params=["dialed here", "dialed there"])
def linked(request: pytest.FixtureRequest, here: Service, peers: Peers) -> Peer:
    peer = peers()
    port = start_here(here)
    port_there = start_peer(peer, 5)
    dialed_here = request.param == "dialed here"
    assert (here.link(PEER, port_there) if dialed_here else peer.call("link", ME, port)) == OK
    return peer


def test_a_stopped_peer_stays_linked(here: Service, linked: Peer) -> None:
    seen = events_of(here)
    for number in range(4):
        here.allocate(f"m{number}", 2, 4, 64, paged=True)
    with linked.stopped(), ThreadPoolExecutor(4) as pool:
        work = [pool.submit(pull, here, f"m{number}", timeout=300) for number in range(4)]
        assert {each.result().status for each in work} == {TIMEOUT}
        assert here.link_states() == {PEER: "linked"}
    linked.call("paint", "theirs", 6)
    assert pull(here) is None
    assert here.colours("mine") == [6]
    assert seen == []
    for service in (here.counters, lambda: linked.call("counters")):
        assert eventually(lambda service=service: not (service()["leases"] or service()["grants"]))


def test_a_peer_that_holds_the_gil_is_waited_for(here: Service, linked: Peer) -> None:
    seen = events_of(here)
    linked.begin("hold_the_gil", 4.0)
    assert pull(here) is None
    linked.answer()
    assert here.colours("mine") == [5]
    assert seen == []


def test_a_dead_peer_is_noticed_by_calls_that_wait(here: Service, linked: Peer) -> None:
    seen = events_of(here)
    with linked.stopped(), ThreadPoolExecutor(1) as pool:
        work = pool.submit(pull, here)
        assert eventually(lambda: bool(here.instance.links.registry.get(PEER)._pending))
        linked.kill()
        failure = work.result(10)
    assert failure.kind == "LLMPeerLostError"
    assert kinds(seen, 1) == ["lost"]


def test_idle_links_send_nothing(
    here: Service, linked: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    monkeypatch.setattr(LinkTable, "on_message", lambda *args: heard.append(args))
    received = here.instance.links.find(PEER).connection.received
    threads = {task.name: ticks(task) for task in Path("/proc/self/task").iterdir()}
    time.sleep(2.0)
    assert heard == []
    assert here.instance.links.find(PEER).connection.received == received
    link_threads = [task for task in threads if name_of(task) == "llm_datadist_to"]
    assert all(ticks(Path("/proc/self/task", task)) == threads[task] for task in link_threads)


def ticks(task: Path) -> int:
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def name_of(task: str) -> str:
    return Path("/proc/self/task", task, "comm").read_text().strip()


def test_a_child_does_not_keep_its_parent_alive(here: Service, linked: Peer) -> None:
    """It has the sockets of the parent, which has been killed, and lives on."""
    seen = events_of(here)
    port = linked.call("listening")[1]
    child = linked.call("fork_a_child", 60)
    try:
        linked.kill()
        assert kinds(seen, 1) == ["lost"]
        # And its port is free.
        again = Service()
        try:
            assert eventually(lambda: starts_at(again, port))
        finally:
            again.finish()
    finally:
        os.kill(child, signal.SIGKILL)


def starts_at(service: Service, port: int) -> bool:
    try:
        service.start(77, listen=f"127.0.0.1:{port}")
    except Exception:  # noqa: BLE001
        return False
    return True


def test_a_child_leaves_the_links_of_its_parent_alone(here: Service, linked: Peer) -> None:
    child = os.fork()
    if child == 0:
        # The parent's sockets are closed here; its links don't notice.
        os._exit(0 if here.instance.links.endpoint.loop._wake == -1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pull(here) is None
    assert linked.call("link_states") == {ME: "linked"}


@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
@pytest.mark.parametrize("end", ["it wakes up", "it dies"])
def test_what_a_hung_peer_uses_is_not_freed(
    here: Service, peers: Peers, operation: str, end: str
) -> None:
    """It may wake up and go on reading and writing."""
    mine = BlocksCacheKey(ME, 0)
    port = here.start(ME, pool=POOL)
    peer = peers()
    peer.call("start", PEER)
    assert peer.call("link", ME, port) == OK
    peer.call("allocate", "theirs", 2, 2, 64, paged=True)
    peer.call("slow_moves", 0.5)
    here.allocate("mine", 2, 2, 64, paged=True, keys=mine)
    peer.begin("attempt", operation, mine, Ref("theirs"), [0, 1], [0, 1])
    assert eventually(lambda: here.counters()["leases"] == 1)
    with peer.stopped():
        here.drop("mine")
        assert here.counters()["leases"] == 1
        assert here.arena_in_use() > 0
        if end == "it dies":
            peer.kill()
            assert eventually(lambda: here.counters()["leases"] == 0)
    if end == "it wakes up":
        assert peer.answer() is None
    assert eventually(lambda: here.counters()["leases"] == 0)
    assert eventually(lambda: here.arena_in_use() == 0)


def test_the_heartbeat_options_are_deprecated(instance_factory: Any) -> None:
    config = LLMConfig()
    config.heartbeat_interval = 250
    with pytest.warns(DeprecationWarning, match="heartbeat_interval"):
        instance_factory(**{"llm.HeartbeatInterval": "250"})
