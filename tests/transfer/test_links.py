# SPDX-License-Identifier: Apache-2.0
"""Links: how they are made, refused, lost and ended (reference API, 11.1, 11.2 and 11.5)."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import pytest

from llm_datadist_torch import (
    BlocksCacheKey,
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist_torch.links import table
from llm_datadist_torch.values.version import VERSION
from tests.peers import Ref, Service, cluster, eventually
from tests.transfer.helpers import OK, Peers, Services, free_port, give_block, only, pull_block


@contextmanager
def listening(answer: bytes | None = None, *, hang_up: bool = False) -> Iterator[int]:
    """A TCP server that is none of us: silent, or with an answer for everybody."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        held = []

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                if answer is not None:
                    connection.sendall(answer)
                if hang_up:
                    connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for connection in held:
            connection.close()


# -- arguments ------------------------------------------------------------------------------------


def unset_id() -> LLMClusterInfo:
    info = cluster(2, 9)
    info._remote_cluster_id = None
    return info


def no_local() -> LLMClusterInfo:
    info = cluster(2, 9)
    info.local_ip_info_list.clear()
    return info


@pytest.mark.parametrize(
    ("clusters", "timeout", "error"),
    [
        ("wrong", None, TypeError),  # the timeout is looked at first
        ("wrong", 1.5, TypeError),
        ("wrong", 2**31, ValueError),
        ("wrong", 0, LLMStatusCode.LLM_PARAM_INVALID),
        ("wrong", -1, LLMStatusCode.LLM_PARAM_INVALID),
        ("wrong", 100, TypeError),
        (None, 100, TypeError),
        ([1], 100, TypeError),
        ({1: 2}, 100, TypeError),
        ([unset_id()], 100, TypeError),
    ],
)
@pytest.mark.parametrize("method", ["link_clusters", "unlink_clusters"])
def test_arguments(here: Service, method: str, clusters: Any, timeout: Any, error: Any) -> None:
    here.start(1)
    call = getattr(here.dd, method)
    if isinstance(error, LLMStatusCode):
        with pytest.raises(LLMException) as caught:
            call(clusters, timeout)
        assert caught.value.status_code == error
    else:
        with pytest.raises(error):
            call(clusters, timeout)


def test_argument_rows_of_one_call_only(here: Service) -> None:
    here.start(1)
    with pytest.raises(LLMException, match="local_ip_info_list is empty") as caught:
        here.dd.link_clusters([no_local()], 100)
    assert caught.value.status_code == LLMStatusCode.LLM_PARAM_INVALID
    with pytest.raises(TypeError):
        here.dd.unlink_clusters([cluster(2, 9)], 100, force=1)
    assert here.dd.unlink_clusters([no_local()], 100, force=True)[0] == LLMStatusCode.LLM_SUCCESS


def test_not_initialised_comes_first() -> None:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    for call in (datadist.link_clusters, datadist.unlink_clusters):
        with pytest.raises(RuntimeError, match="init"):
            call("wrong", None)


def test_empty_list(here: Service) -> None:
    here.start(1)
    assert here.dd.link_clusters([]) == (LLMStatusCode.LLM_PARAM_INVALID, [])
    assert here.dd.unlink_clusters([]) == (LLMStatusCode.LLM_PARAM_INVALID, [])


@pytest.mark.parametrize("kind", ["no remote", "two remotes", "two locals"])
def test_wrong_number_of_addresses(pair: tuple[Service, Service, int], kind: str) -> None:
    here, _, port = pair
    info = cluster(2, port if kind != "no remote" else None)
    if kind == "two remotes":
        info.append_remote_ip_info("127.0.0.1", port)
    if kind == "two locals":
        info.append_local_ip_info("127.0.0.1", 0)
    assert here.dd.link_clusters([info]) == (
        LLMStatusCode.LLM_PARAM_INVALID,
        [LLMStatusCode.LLM_PARAM_INVALID],
    )
    expected = (
        LLMStatusCode.LLM_SUCCESS if kind == "two locals" else LLMStatusCode.LLM_PARAM_INVALID
    )
    assert here.dd.unlink_clusters([info]) == (expected, [expected])


# -- who answers ----------------------------------------------------------------------------------


def test_refused_port(here: Service) -> None:
    here.start(1)
    started = time.monotonic()
    assert here.link(2, free_port(), 30_000) == only("LLM_LINK_FAILED")
    assert time.monotonic() - started < 15
    assert here.link_states() == {}


def test_silent_server(here: Service) -> None:
    here.start(1)
    with listening() as port:
        started = time.monotonic()
        assert here.link(2, port, 300) == only("LLM_TIMEOUT")
        assert 0.25 < time.monotonic() - started < 15


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n" * 10, b"\xff" * 200]
)
def test_other_protocol(here: Service, answer: bytes) -> None:
    here.start(1)
    with listening(answer, hang_up=True) as port:
        assert here.link(2, port, 5000) == only("LLM_LINK_FAILED")


def test_peer_hangs_up(here: Service) -> None:
    here.start(1)
    with listening(hang_up=True) as port:
        assert here.link(2, port, 5000) == only("LLM_LINK_FAILED")


@pytest.mark.parametrize("dialing", ["older", "newer"])
def test_another_version_is_refused(
    here: Service, services: Services, dialing: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Both sides say so, whichever dials."""
    port = here.start(1)
    version = {"older": "0.0.9", "newer": "9.0.0"}[dialing]
    monkeypatch.setattr(table, "VERSION", version)
    other = services()
    other_port = other.start(2)
    for dialer, peer, address in ((other, 1, port), (here, 2, other_port)):
        caplog.clear()
        assert dialer.link(peer, address) == only("LLM_LINK_FAILED")
        told = [r.message for r in caplog.records if "runs version" in r.message]
        assert eventually(
            lambda: len([r for r in caplog.records if "runs version" in r.message]) >= 1
        )
        assert any(f"{version}/" in text and f"{VERSION}/" in text for text in told)
    assert (here.link_states(), other.link_states()) == ({}, {})


def test_repeat_link(pair: tuple[Service, Service, int]) -> None:
    here, other, port = pair
    assert here.link(2, port) == OK
    assert here.link(2, port) == only("LLM_ALREADY_LINK")
    both = here.dd.link_clusters([cluster(2, port), cluster(2, port)])
    assert both[0] == LLMStatusCode.LLM_ALREADY_LINK
    assert other.link_states() == {1: "linked"}
    assert pull_block(here, 2) is None


def test_same_peer_twice_in_one_call(pair: tuple[Service, Service, int]) -> None:
    here, other, port = pair
    _, each = here.dd.link_clusters([cluster(2, port), cluster(2, port)])
    # They are asked at once: which of the two comes first is open.
    assert sorted(status.name for status in each) == ["LLM_ALREADY_LINK", "LLM_SUCCESS"]
    assert (here.link_states(), other.link_states()) == ({2: "linked"}, {1: "linked"})
    assert pull_block(here, 2) is None
    assert pull_block(other, 1) is None


def test_wrong_cluster_id(pair: tuple[Service, Service, int]) -> None:
    here, other, port = pair
    assert here.link(77, port) == only("LLM_PARAM_INVALID")
    assert (here.link_states(), other.link_states()) == ({}, {})
    assert here.link(2, port) == OK


def test_flag_mismatch(here: Service, services: Services) -> None:
    here.start(1, remote=True)
    other = services()
    port = other.start(2, remote=False)
    assert here.link(2, port) == only("LLM_PARAM_INVALID")
    assert other.link_states() == {}


def test_own_cluster_id(here: Service) -> None:
    port = here.start(1)
    give_block(here, 1, 11)
    assert here.link(1, port) == OK
    failure = pull_block(here, 1)
    assert failure.status == "LLM_PARAM_INVALID"
    assert here.unlink(1, port) == OK
    assert here.link_states() == {}


def test_several_at_once_one_bad(here: Service, services: Services) -> None:
    here.start(1)
    here.allocate("theirs", 2, 2, 64, paged=True)
    infos = []
    for peer in range(2, 20):
        other = services()
        infos.append(cluster(peer, other.start(peer)))
        give_block(other, peer, peer)
    infos.insert(5, cluster(99, free_port()))
    overall, each = here.dd.link_clusters(infos, 30_000)
    expected = ["LLM_SUCCESS"] * 18
    expected.insert(5, "LLM_LINK_FAILED")
    assert (overall.name, [status.name for status in each]) == ("LLM_LINK_FAILED", expected)
    for peer in range(2, 20):
        assert pull_block(here, peer) is None
        assert here.colours("theirs") == [peer]


def test_both_sides_link_at_the_same_moment(here: Service, peers: Peers) -> None:
    ports = {1: here.start(1)}
    give_block(here, 1, 11)
    peer = peers()
    ports[2] = peer.call("start", 2)
    peer.call("allocate", "mine", 2, 2, 64, paged=True, keys=BlocksCacheKey(2, 0))
    peer.call("allocate", "theirs", 2, 2, 64, paged=True)
    peer.call("paint", "mine", 22)
    for _ in range(25):
        peer.begin("link", 1, ports[1])
        mine, theirs = here.link(2, ports[2])[0], peer.answer()[0]
        # Who comes when the link is there is told so; whose dials crossed has what it asked for.
        assert "LLM_SUCCESS" in (mine, theirs)
        assert {mine, theirs} <= {"LLM_ALREADY_LINK", "LLM_SUCCESS"}
        assert (here.link_states(), peer.call("link_states")) == ({2: "linked"}, {1: "linked"})
        assert pull_block(here, 2) is None
        assert (
            peer.call("attempt", "pull_blocks", BlocksCacheKey(1, 0), Ref("theirs"), [0, 1], [0, 1])
            is None
        )
        assert (here.colours("theirs"), peer.call("colours", "theirs")) == ([22], [11])
        assert here.unlink(2, ports[2]) == OK
        assert eventually(lambda: peer.call("link_states") == {})


@pytest.mark.parametrize("me", [1, 3])
def test_a_dial_that_nobody_answers_makes_way(here: Service, services: Services, me: int) -> None:
    """Each dials the other, one of them an address where it gets no answer."""
    port = here.start(me)
    give_block(here, me, 11)
    other = services()
    other.start(2)
    give_block(other, 2, 22)
    with listening() as silent, ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            mine = pool.submit(here.link, 2, silent, 60_000)
            assert eventually(lambda: here.instance.links._handshake._dials)
            assert other.link(me, port) == OK
            # What was asked for is there, by the other's dial.
            assert mine.result(10) == OK
            assert (here.link_states(), other.link_states()) == ({2: "linked"}, {me: "linked"})
            assert pull_block(here, 2) is None
            assert pull_block(other, me) is None
            assert other.unlink(me, port) == OK
            assert eventually(lambda: here.link_states() == {})


@pytest.mark.parametrize("me", [1, 3])
def test_a_sleeping_peer_does_not_keep_the_other_dial_away(
    here: Service, services: Services, peers: Peers, me: int
) -> None:
    """The address belongs to an earlier life of the peer, which sleeps: it takes connections."""
    port = here.start(me)
    give_block(here, me, 11)
    old, new = peers(), services()
    port_of_old = old.call("start", 2)
    new.start(2)
    give_block(new, 2, 22)
    with old.stopped(), ThreadPoolExecutor(1) as pool:
        mine = pool.submit(here.link, 2, port_of_old, 60_000)
        assert eventually(lambda: here.instance.links._handshake._dials)
        assert new.link(me, port) == OK
        assert mine.result(10) == OK
        assert pull_block(here, 2) is None
    # Awake, it finds nobody who wants a link of it.
    assert eventually(lambda: old.call("link_states") == {})
    assert here.link_states() == {2: "linked"}
    assert pull_block(new, me) is None


def test_both_dial_an_address_where_nobody_answers(here: Service, services: Services) -> None:
    here.start(1)
    other = services()
    other.start(2)
    with listening() as silent, ThreadPoolExecutor(2) as pool:
        mine = pool.submit(here.link, 2, silent, 300)
        theirs = pool.submit(other.link, 1, silent, 300)
        assert (mine.result(10), theirs.result(10)) == (only("LLM_TIMEOUT"), only("LLM_TIMEOUT"))
    assert (here.link_states(), other.link_states()) == ({}, {})


@pytest.mark.parametrize("who", ["survivor", "restarted"])
def test_restarted_peer_links_again(here: Service, peers: Peers, who: str) -> None:
    port = here.start(1)
    give_block(here, 1, 11)
    first = peers()
    assert here.link(2, first.call("start", 2)) == OK
    first.kill()
    second = peers()
    port_of_second = second.call("start", 2)
    if who == "survivor":
        assert eventually(lambda: here.link_states() == {2: "lost"})
        assert here.link(2, port_of_second) == OK
    else:
        assert second.call("link", 1, port) == OK
    second.call("allocate", "mine", 2, 2, 64, paged=True, keys=BlocksCacheKey(2, 0))
    second.call("paint", "mine", 99)
    assert pull_block(here, 2) is None
    assert here.colours("theirs") == [99]
    assert here.link_states() == {2: "linked"}


def test_new_life_replaces_the_stale_link(here: Service, services: Services) -> None:
    """The old life has not been noticed to be gone: its sockets are still open."""
    port = here.start(1)
    give_block(here, 1, 11)
    old, new = services(), services()
    old.start(2)
    assert old.link(1, port) == OK
    new.start(2)
    give_block(new, 2, 33)
    assert new.link(1, port) == OK
    assert pull_block(here, 2) is None
    assert here.colours("theirs") == [33]
    old.allocate("theirs", 2, 2, 64, paged=True)
    assert pull_block(old, 1).status == "LLM_NOT_YET_LINK"


def test_bidirectional(pair: tuple[Service, Service, int]) -> None:
    here, other, port = pair
    assert here.link(2, port) == OK
    assert pull_block(here, 2) is None
    assert pull_block(other, 1) is None
    assert (here.colours("theirs"), other.colours("theirs")) == ([22], [11])


# -- other addresses ------------------------------------------------------------------------------


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"] if socket.has_ipv6 else ["127.0.0.1"])
def test_address_families(here: Service, services: Services, ip: str) -> None:
    text = f"[{ip}]:0" if ":" in ip else f"{ip}:0"
    here.start(1, listen=None)
    other = services()
    port = other.start(2, listen=text)
    give_block(other, 2, 22)
    here.allocate("theirs", 2, 2, 64, paged=True)
    assert here.link(2, port, ip=ip) == OK
    assert pull_block(here, 2) is None
    assert here.colours("theirs") == [22]
    assert here.dd.unlink_clusters([cluster(2, port, ip)])[0] == LLMStatusCode.LLM_SUCCESS
