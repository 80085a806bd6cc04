# SPDX-License-Identifier: Apache-2.0
"""The tables of links, near and far, in both modes (reference API, 11.1 to 11.3, appendix A)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from socket import create_server
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from tests.conformance.conftest import Linked
from tests.conformance.setups import ME, PEER
from tests.peers import Ref, Service, cluster, eventually
from tests.transfer.helpers import free_port, give_block

STRANGER = 77
OK, PI, NYL = "LLM_SUCCESS", "LLM_PARAM_INVALID", "LLM_NOT_YET_LINK"


def peer_port(peer: Any) -> int:
    return peer.call("listening")[1]


def port_of(here: Service) -> int:
    address = here.dd.listen_address
    assert address is not None
    return address[1]


def silent(here: Service) -> str:
    with closing(create_server(("127.0.0.1", 0))) as server:
        return here.link(STRANGER, server.getsockname()[1], 300)[0]


def unlinked(here: Service, peer: Any) -> None:
    """Takes the link of the setup away, on both sides."""
    assert here.unlink(PEER, peer_port(peer))[0] == OK
    assert eventually(lambda: peer.call("link_states") == {})


def with_other_mode(here: Service, peer: Any) -> str:
    unlinked(here, peer)
    other = Service()
    try:
        other.start(3, remote=not here.instance.config.remote_accessible)
        return other.link(PEER, peer_port(peer))[0]
    finally:
        other.finish()


def under_another_id(here: Service, peer: Any) -> str:
    unlinked(here, peer)
    return here.link(STRANGER, peer_port(peer))[0]


def again_after_unlink(here: Service, peer: Any) -> str:
    unlinked(here, peer)
    return here.link(PEER, peer_port(peer))[0]


def both_at_once(here: Service, peer: Any) -> str:
    """The overall status is that of the last that failed; who succeeded stays linked."""
    unlinked(here, peer)
    overall, each = here.dd.link_clusters([cluster(STRANGER, free_port()), near(peer)], 10_000)
    assert [status.name for status in each] == ["LLM_LINK_FAILED", OK]
    assert here.link_states() == {PEER: "linked"}
    return overall.name


def near(peer: Any, **wrong: int) -> Any:
    """A good description of the peer, with one list wrong."""
    info = cluster(PEER, peer_port(peer))
    if "remotes" in wrong:
        info.remote_ip_info_list[:] = info.remote_ip_info_list * wrong["remotes"]
    if "locals" in wrong:
        info.local_ip_info_list[:] = info.local_ip_info_list * wrong["locals"]
    return info


def given(here: Service, info: Any) -> str:
    overall, each = here.dd.link_clusters([info], 10_000)
    assert each == [overall]
    return overall.name


# What is asked for, and the status of the peer concerned (11.1).
LINK: dict[str, tuple[Callable[[Service, Any], str], str]] = {
    "again": (lambda h, p: h.link(PEER, peer_port(p))[0], "LLM_ALREADY_LINK"),
    "again, by the peer": (lambda h, p: p.call("link", ME, port_of(h))[0], "LLM_ALREADY_LINK"),
    "after unlink": (again_after_unlink, OK),
    "refused port": (lambda h, p: h.link(STRANGER, free_port())[0], "LLM_LINK_FAILED"),
    "silence": (lambda h, p: silent(h), "LLM_TIMEOUT"),
    "no remote address": (lambda h, p: given(h, near(p, remotes=0)), PI),
    "two remote addresses": (lambda h, p: given(h, near(p, remotes=2)), PI),
    "two local addresses": (lambda h, p: given(h, near(p, locals=2)), PI),
    "other mode": (with_other_mode, PI),
    "another id than it has": (under_another_id, PI),  # section 14, 46
    "own cluster": (lambda h, p: h.link(ME, port_of(h))[0], OK),
    "one good, one bad": (both_at_once, "LLM_LINK_FAILED"),
}  # fmt: skip


@pytest.mark.parametrize("row", LINK)
def test_link_clusters(answering: Linked, row: str) -> None:
    _, here, peer = answering
    call, expected = LINK[row]
    assert call(here, peer) == expected


def test_nobody(answering: Linked) -> None:
    _, here, _ = answering
    assert here.dd.link_clusters([]) == (LLMStatusCode.LLM_PARAM_INVALID, [])
    assert here.dd.unlink_clusters([]) == (LLMStatusCode.LLM_PARAM_INVALID, [])
    with pytest.raises(LLMException) as caught:
        here.dd.link_clusters([cluster(STRANGER, 9)], 0)
    assert caught.value.status_code == LLMStatusCode.LLM_PARAM_INVALID


def pull(here: Service, peer: int = PEER) -> str:
    failure = here.attempt("pull_blocks", BlocksCacheKey(peer, 0), Ref("theirs"), [0], [0])
    return OK if failure is None else failure.status


@pytest.fixture
def blocks(answering: Linked) -> Linked:
    """Both have a block to pull."""
    _, here, peer = answering
    give_block(here, ME, 11)
    peer.call("allocate", "mine", 2, 2, 64, paged=True, keys=BlocksCacheKey(PEER, 0))
    peer.call("allocate", "theirs", 2, 2, 64, paged=True)
    assert pull(here) == OK
    return answering


def test_a_link_serves_both_directions(blocks: Linked) -> None:
    _, _, peer = blocks
    args = ("pull_blocks", BlocksCacheKey(ME, 0), Ref("theirs"), [0], [0])
    assert peer.call("attempt", *args) is None


def test_pull_from_who_is_not_linked_and_from_oneself(blocks: Linked) -> None:
    _, here, _ = blocks
    assert pull(here, STRANGER) == NYL
    assert pull(here, ME) == PI


@pytest.mark.parametrize("force", [False, True])
def test_unlink_clusters(blocks: Linked, force: bool) -> None:
    """11.2: who is told, and what a second call says. Ours is told in both forms."""
    _, here, peer = blocks
    port = None if force else peer_port(peer)
    for _ in range(2):
        assert here.unlink(PEER, port, force=force)[0] == OK
        assert here.link_states() == {}
    assert pull(here) == NYL
    assert eventually(lambda: peer.call("link_states") in ({}, {ME: "lost"}))


def test_unlink_needs_one_address_unless_forced(blocks: Linked) -> None:
    _, here, peer = blocks
    for info in (near(peer, remotes=0), near(peer, remotes=2)):
        assert here.dd.unlink_clusters([info])[0].name == PI
        assert pull(here) == OK
        assert here.dd.unlink_clusters([info], force=True)[0].name == OK
        assert eventually(lambda: peer.call("link_states") != {ME: "linked"})
        assert here.link(PEER, peer_port(peer))[0] == OK


def test_unlink_of_a_peer_that_left(blocks: Linked) -> None:
    """It says so when it leaves (deviation from 6.4): the link is lost, and listed until forced."""
    _, here, peer = blocks
    port = peer_port(peer)
    peer.call("finish")
    assert eventually(lambda: pull(here) == NYL)
    assert here.unlink(PEER, port)[0] in ("LLM_UNLINK_FAILED", "LLM_TIMEOUT")
    assert here.unlink(PEER, force=True)[0] == OK
    assert here.link_states() == {}


def test_links_stand_in_the_way_of_a_switch(answering: Linked) -> None:
    """11.3."""
    _, here, peer = answering
    with pytest.raises(LLMException) as caught:
        here.dd.switch_role(LLMRole.DECODER)
    assert caught.value.status_code == LLMStatusCode.LLM_EXIST_LINK
    unlinked(here, peer)
    here.dd.switch_role(LLMRole.DECODER)
    assert here.dd.listen_address is None
    assert here.link(PEER, peer_port(peer))[0] == OK  # who does not listen can still ask
