# SPDX-License-Identifier: Apache-2.0
"""Linking by rank table when members are missing, sleep, die, disagree or give up."""

from __future__ import annotations

import operator
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from llm_datadist_torch import LLMException
from llm_datadist_torch.net import strangers
from tests.peers import Service, eventually
from tests.transfer.helpers import Peers, Services
from tests.transfer.tables import TABLE, WAIT_MS, device, members, server, status_of, table


@pytest.fixture
def at_rest() -> Iterator[None]:
    """Afterwards there are no more sockets and threads than before."""

    def counted() -> tuple[int, int]:
        return Service().resources()["fds"], threading.active_count()

    before = counted()
    yield
    assert eventually(lambda: all(map(operator.le, counted(), before))), (before, counted())


@pytest.mark.usefixtures("at_rest")
@pytest.mark.parametrize("me", [1, 2])
def test_nobody_comes(services: Services, me: int) -> None:
    service = services()
    service.start(me, listen=None)
    with pytest.raises(LLMException, match=f"cluster {3 - me}") as caught:
        service.dd.link("n", members(1, 2), TABLE, timeout=300, wait=True)
    assert caught.value.status_code.name == "LLM_TIMEOUT"
    # Nothing is left of it, but its number.
    with pytest.raises(LLMException, match="no communicator"):
        service.dd.query_register_mem_status(1)
    assert service.dd.link("n", members(1, 2), TABLE, timeout=100) == 2
    assert eventually(lambda: status_of(service, 2) == "FAILED")
    service.dd.unlink(2)
    service.finish()


@pytest.mark.usefixtures("at_rest")
def test_a_silent_server_at_the_meeting_point(services: Services) -> None:
    service = services()
    service.start(2, listen=None)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        point = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(LLMException) as caught:
            service.dd.link("n", members(1, 2), TABLE, timeout=300, rendezvous=point, wait=True)
        assert caught.value.status_code.name == "LLM_TIMEOUT"
    service.finish()


@pytest.mark.parametrize("sleeper", [1, 2])
def test_a_member_falls_asleep(here: Service, peers: Peers, sleeper: int) -> None:
    """The third never comes; meanwhile one of the two that have come sleeps."""
    here.start(3 - sleeper, listen=None)
    peer = peers()
    peer.call("start", sleeper, listen=None)
    peer.call("begin_link_by_table", "n", members(1, 2, 3), TABLE, WAIT_MS)
    time.sleep(0.2)
    comm_id = here.dd.link("n", members(1, 2, 3), TABLE, timeout=1500)
    time.sleep(0.3)
    with peer.stopped():
        assert eventually(lambda: status_of(here, comm_id) == "FAILED")
        here.dd.unlink(comm_id)
        here.finish()


@pytest.mark.parametrize("victim", [1, 2])
def test_a_member_dies_and_comes_again(here: Service, peers: Peers, victim: int) -> None:
    here.start(3 - victim, listen=None)
    here.dd.link("n", members(1, 2, 3), TABLE, timeout=WAIT_MS)
    first = peers()
    first.call("start", victim, listen=None)
    first.call("begin_link_by_table", "n", members(1, 2, 3), TABLE, WAIT_MS)
    time.sleep(0.3)
    first.kill()
    assert status_of(here, 1) == "PREPARING"
    here.dd.unlink(1)
    # The same three, with a new process in the place of the dead one.
    second, third = peers(), peers()
    second.call("start", victim, listen=None)
    third.call("start", 3, listen=None)
    for peer in (second, third):
        peer.begin("link_by_table", "n", members(1, 2, 3), TABLE, WAIT_MS)
    assert here.link_by_table("n", members(1, 2, 3), TABLE, WAIT_MS) == 2
    assert (second.answer(), third.answer()) == (1, 1)
    assert set(here.link_states().values()) == {"linked"}


def test_members_that_disagree(two: tuple[Service, Service]) -> None:
    here, other = two
    here.dd.link("n", {1: 0, 2: 1, 3: 2}, TABLE, timeout=1000)
    with pytest.raises(LLMException, match=r"\(2, 3\)") as caught:
        other.dd.link("n", {1: 0, 2: 1}, TABLE, timeout=500, wait=True)
    assert caught.value.status_code.name == "LLM_PARAM_INVALID"
    assert eventually(lambda: status_of(here, 1) == "FAILED")


def test_an_address_that_is_not_ours(two: tuple[Service, Service]) -> None:
    here, _ = two
    text = table(server("0", device(0), host_ip="203.0.113.1"), server("1", device(1)))
    with pytest.raises(LLMException, match="host_ip") as caught:
        here.dd.link("n", members(1, 2), text, timeout=WAIT_MS, wait=True)
    assert caught.value.status_code.name == "LLM_LINK_FAILED"


def test_flags_that_differ(here: Service, services: Services) -> None:
    other = services()
    here.start(1, listen=None, remote=True)
    other.start(2, listen=None, remote=False)
    for service in (here, other):
        service.dd.link("n", members(1, 2), TABLE, timeout=1000)
    for service in (here, other):
        assert eventually(lambda s=service: status_of(s, 1) == "FAILED")
    assert (here.link_states(), other.link_states()) == ({}, {})


def test_a_meeting_lasts_longer_than_a_stranger_may_stay(
    two: tuple[Service, Service],
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A member that waits for others is none of the strangers, which are turned away in time."""
    monkeypatch.setattr(strangers, "STRANGER_S", 0.5)
    for service in two:
        service.dd.link("n", members(1, 2, 3), TABLE, timeout=WAIT_MS)
    time.sleep(1.5)
    assert "stranger" not in caplog.text
    third = services()
    third.start(3, listen=None)
    assert third.link_by_table("n", members(1, 2, 3), TABLE, WAIT_MS) == 1


@pytest.mark.parametrize("me", [1, 2])
@pytest.mark.parametrize("end", ["unlink", "finalize"])
def test_given_up_while_it_is_prepared(services: Services, me: int, end: str) -> None:
    service = services()
    service.start(me, listen=None)
    comm_id = service.dd.link("n", members(1, 2), TABLE, timeout=WAIT_MS)
    time.sleep(0.1)
    if end == "unlink":
        service.dd.unlink(comm_id)
        assert service.instance.communicators.preparing == 0
    service.finish()
    # A thread that waits to dial again notices within 20 ms; nobody waits for it.
    assert eventually(lambda: not [t for t in threading.enumerate() if "llmdd-link" in t.name])
