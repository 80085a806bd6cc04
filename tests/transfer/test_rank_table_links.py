# SPDX-License-Identifier: Apache-2.0
"""Linking by rank table between processes: rendezvous, shared links, members that are missing."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey, LLMException
from llm_datadist_torch.links.communicating import RENDEZVOUS_VARIABLE
from tests.devices import on_npu
from tests.peers import Peer, Ref, Service, eventually
from tests.transfer.helpers import OK, Peers, Services, free_port, give_block, pull_block
from tests.transfer.tables import TABLE, WAIT_MS, device, members, server, status_of, table

ENGINE = "127.0.0.1:0" if on_npu() else None
"""A transfer engine, which moves device memory between processes, is named by an address."""


def give(peer: Peer, cluster_id: int) -> None:
    """A blocks cache of its own colour, and room for another's."""
    peer.call("allocate", "mine", 2, 2, 64, paged=True, keys=BlocksCacheKey(cluster_id, 0))
    peer.call("allocate", "theirs", 2, 2, 64, paged=True)
    peer.call("paint", "mine", cluster_id)


def pull(peer: Peer, owner: int) -> Any:
    return peer.call(
        "attempt", "pull_blocks", BlocksCacheKey(owner, 0), Ref("theirs"), [0, 1], [0, 1]
    )


def both(here: Service, other: Service, name: str = "pair", **keywords: Any) -> tuple[int, int]:
    """A communicator of instances 1 and 2 of this process."""
    keywords.setdefault("timeout", WAIT_MS)
    ids = [s.dd.link(name, members(1, 2), TABLE, **keywords) for s in (here, other)]
    for service, comm_id in zip((here, other), ids, strict=True):
        service.instance.communicators.wait(comm_id)
    return ids[0], ids[1]


def assert_linked(here: Service, other: Service) -> None:
    assert (here.link_states(), other.link_states()) == ({2: "linked"}, {1: "linked"})
    assert pull_block(here, 2) is None
    assert pull_block(other, 1) is None
    assert (here.colours("theirs"), other.colours("theirs")) == ([22], [11])


def assert_apart(here: Service, other: Service) -> None:
    assert eventually(lambda: here.link_states() == other.link_states() == {})
    assert pull_block(here, 2).status == "LLM_NOT_YET_LINK"
    assert pull_block(other, 1).status == "LLM_NOT_YET_LINK"


# -- members that all come ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("remote", [False, True], ids=["two-sided", "remote-accessible"])
def test_processes_link_all_at_once(peers: Peers, count: int, remote: bool) -> None:
    ids = [7, 3, 9, 5][:count]
    processes = {cluster_id: peers() for cluster_id in ids}
    for cluster_id, process in processes.items():
        process.call("start", cluster_id, listen=ENGINE, remote=remote)
        give(process, cluster_id)
    for process in processes.values():
        process.begin("link_by_table", "all", members(*ids), TABLE, WAIT_MS)
    assert [process.answer() for process in processes.values()] == [1] * count
    for cluster_id, process in processes.items():
        others = [other for other in ids if other != cluster_id]
        assert process.call("link_states") == dict.fromkeys(others, "linked")
        for other in others:
            assert pull(process, other) is None
            assert process.call("colours", "theirs") == [other]
    for process in processes.values():
        process.call("unlink_by_table", 1)
    for process in processes.values():
        assert process.call("link_states") == {}


@pytest.mark.parametrize("first", [0, 1, 2])
def test_members_may_come_late(here: Service, services: Services, first: int) -> None:
    three = [here, services(), services()]
    for cluster_id, service in enumerate(three, 1):
        service.start(cluster_id, listen=None)
    order = three[first:] + three[:first]
    for service in order:
        assert service.dd.link("late", members(1, 2, 3), TABLE, timeout=WAIT_MS) == 1
        time.sleep(0.1)
        if service is not order[-1]:
            assert status_of(service, 1) == "PREPARING"
    for service in three:
        assert eventually(lambda s=service: status_of(s, 1) == "OK")
        assert set(service.link_states().values()) == {"linked"}


def test_until_ok_there_is_no_link(two: tuple[Service, Service]) -> None:
    here, other = two
    comm_id = here.dd.link("n", members(1, 2), TABLE, timeout=WAIT_MS)
    assert status_of(here, comm_id) == "PREPARING"
    assert pull_block(here, 2).status == "LLM_NOT_YET_LINK"
    assert other.dd.link("n", members(1, 2), TABLE, timeout=WAIT_MS, wait=True) == 1
    assert eventually(lambda: status_of(here, comm_id) == "OK")
    assert_linked(here, other)


def test_registering_after_link(two: tuple[Service, Service]) -> None:
    here, other = two
    both(here, other)
    other.register("late", 2, 2, 64, paged=True, keys=BlocksCacheKey(2, 1), accessible=True)
    other.paint("late", 77)
    key = BlocksCacheKey(2, 1)
    assert here.attempt("pull_blocks", key, Ref("theirs"), [0, 1], [0, 1]) is None
    assert here.colours("theirs") == [77]


@pytest.mark.needs_ipv6
def test_ipv6(two: tuple[Service, Service]) -> None:
    here, other = two
    text = table(server("0", device(0), host_ip="::1"), server("1", device(1)))
    for service in two:
        service.dd.link("six", members(1, 2), text, timeout=WAIT_MS)
    for service in two:
        service.instance.communicators.wait(1)
    assert_linked(here, other)


@pytest.mark.parametrize("by", ["keyword", "environment"])
def test_another_meeting_point(
    two: tuple[Service, Service], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    here, other = two
    # Nobody would find the other at the address of this table.
    text = table(server("0", device(0), host_ip="203.0.113.1"), server("1", device(1)))
    point = f"127.0.0.1:{free_port()}"
    if by == "environment":
        monkeypatch.setenv(RENDEZVOUS_VARIABLE, point)
    given = {"rendezvous": point} if by == "keyword" else {}
    for service in two:
        service.dd.link("n", members(1, 2), text, timeout=WAIT_MS, **given)
    for service in two:
        service.instance.communicators.wait(1)
    assert_linked(here, other)


@pytest.mark.parametrize("server_id", ["203.0.113.1", "pod"])
def test_one_host_whose_addresses_the_table_has_not(
    two: tuple[Service, Service], server_id: str
) -> None:
    """A device_ip is in the network of the devices, and a server_id may be any text."""
    servers = [server(server_id, device(rank, device_ip=f"203.0.113.{rank}")) for rank in range(2)]
    for service in two:
        service.dd.link("n", members(1, 2), table(*servers), timeout=WAIT_MS)
    for service in two:
        service.instance.communicators.wait(1)
    assert_linked(*two)


def test_a_taken_port_is_waited_for(two: tuple[Service, Service]) -> None:
    here, other = two
    with closing(socket.create_server(("127.0.0.1", 0))) as squatter:
        point = f"127.0.0.1:{squatter.getsockname()[1]}"
        for service in two:
            service.dd.link("n", members(1, 2), TABLE, timeout=WAIT_MS, rendezvous=point)
        time.sleep(0.3)
        assert status_of(here, 1) == "PREPARING"
    # What was connected to the squatter was cut off with it.
    for service in two:
        service.instance.communicators.wait(1)
    assert_linked(here, other)


def test_many_communicators_at_one_meeting_point(two: tuple[Service, Service]) -> None:
    """Different names, and one name again and again, all at the same port."""
    here, other = two
    point = f"127.0.0.1:{free_port()}"
    names = ["a", "b", "b", "b", "c"]
    for service, order in ((here, names), (other, names[::-1])):
        for name in order:
            service.dd.link(name, members(1, 2), TABLE, timeout=WAIT_MS, rendezvous=point)
    for service in two:
        for comm_id in range(1, 6):
            service.instance.communicators.wait(comm_id)
    assert_linked(here, other)
    for comm_id in range(1, 5):
        here.dd.unlink(comm_id)
    assert_linked(here, other)
    here.dd.unlink(5)
    assert_apart(here, other)


# -- one link, several holders --------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 2])
def test_two_communicators_share_a_link(two: tuple[Service, Service], first: int) -> None:
    here, other = two
    assert both(here, other, "one") == (1, 1)
    (link,) = here.instance.links.links()
    assert both(here, other, "two") == (2, 2)
    assert here.instance.links.links() == [link]
    here.dd.unlink(first)
    assert_linked(here, other)
    other.dd.unlink(first)
    assert_linked(here, other)
    here.dd.unlink(3 - first)
    assert_apart(here, other)
    # Its own end is the other side's to tell.
    other.dd.unlink(3 - first)
    with pytest.raises(LLMException, match="no communicator"):
        other.dd.unlink(3 - first)


@pytest.mark.parametrize("order", ["clusters first", "communicator first"])
@pytest.mark.parametrize("ends_first", ["clusters", "communicator"])
def test_link_clusters_and_link_share_a_link(
    pair: tuple[Service, Service, int], order: str, ends_first: str
) -> None:
    here, other, port = pair
    if order == "clusters first":
        assert here.link(2, port) == OK
        both(here, other)
    else:
        both(here, other)
        assert here.link(2, port) == OK
    assert_linked(here, other)
    if ends_first == "communicator":
        for service in (here, other):
            service.dd.unlink(1)
            assert_linked(here, other)
        assert here.unlink(2, port) == OK
    else:
        assert here.unlink(2, port) == OK
        assert_linked(here, other)
        here.dd.unlink(1)
    assert_apart(here, other)


def test_one_member_more_or_less(here: Service, services: Services) -> None:
    three = [here, services(), services()]
    for cluster_id, service in enumerate(three, 1):
        service.start(cluster_id, listen=None)
    for name, who in (("all", (1, 2, 3)), ("some", (1, 2))):
        for cluster_id in who:
            three[cluster_id - 1].dd.link(name, members(*who), TABLE, timeout=WAIT_MS)
        for cluster_id in who:
            communicators = three[cluster_id - 1].instance.communicators
            communicators.wait(2 if name == "some" else 1)
    three[0].dd.unlink(1)
    assert eventually(lambda: three[0].link_states() == {2: "linked"})
    assert eventually(lambda: three[2].link_states() == {2: "linked"})
    assert three[1].link_states() == {1: "linked", 3: "linked"}


def test_linked_again_after_the_peer_was_killed(here: Service, peers: Peers) -> None:
    here.start(1, listen=ENGINE)
    give_block(here, 1, 11)
    for round_ in (1, 2, 3):
        peer = peers()
        peer.call("start", 2, listen=ENGINE)
        give(peer, 2)
        peer.begin("link_by_table", "again", members(1, 2), TABLE, WAIT_MS)
        assert here.link_by_table("again", members(1, 2), TABLE, WAIT_MS) == round_
        assert peer.answer() == 1
        assert pull_block(here, 2) is None
        peer.kill()
        if round_ == 2:
            assert eventually(lambda: here.link_states() == {2: "lost"})
            here.dd.unlink(round_)
    assert eventually(lambda: here.link_states() == {2: "lost"})
    for comm_id in (1, 3):
        here.dd.unlink(comm_id)
    assert here.link_states() == {}


def test_link_again_and_again(two: tuple[Service, Service]) -> None:
    here, other = two
    with ThreadPoolExecutor(2) as pool:
        for round_ in range(1, 11):
            made = [pool.submit(s.link_by_table, "n", members(1, 2), TABLE, WAIT_MS) for s in two]
            assert [m.result(60) for m in made] == [round_, round_]
            assert_linked(here, other)
            here.dd.unlink(round_)
            other.dd.unlink(round_)
            assert_apart(here, other)
