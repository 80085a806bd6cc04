# SPDX-License-Identifier: Apache-2.0
"""Lost links that are made anew on their next use."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_datadist_torch import LLMException
from llm_datadist_torch.links.handshake import Handshake
from llm_datadist_torch.links.link import RelinkTurn
from llm_datadist_torch.links.relink import _take
from llm_datadist_torch.serving.peer import LinkState
from llm_datadist_torch.values.deadline import Deadline
from tests.faults.helpers import (
    ME,
    NYL,
    OK,
    PEER,
    THEIRS,
    Peers,
    events_of,
    kinds,
    pull,
    start_here,
    start_peer,
)
from tests.peers import Service, eventually


def lose(here: Service, peers: Peers, **further: object) -> int:
    """A link to a peer that has died; returns the port that it had."""
    peer = peers()
    port = start_peer(peer, 5, remote=bool(further.get("remote")))
    start_here(here, **further)
    assert here.link(PEER, port) == OK
    assert pull(here) is None
    seen = events_of(here)
    peer.kill()
    assert eventually(lambda: here.link_states() == {PEER: "lost"})
    # What is told of it comes a moment later, and is no news to those who listen after this.
    assert kinds(seen, 1) == ["lost"]
    return port


def come_back(peers: Peers, port: int, colour: int, **further: object) -> None:
    peer = peers()
    start_peer(peer, colour, listen=f"127.0.0.1:{port}", **further)


@pytest.mark.parametrize("remote", [False, True])
def test_a_peer_that_comes_back_as_a_new_process(here: Service, peers: Peers, remote: bool) -> None:
    port = lose(here, peers, remote=remote)
    seen = events_of(here)
    epoch = here.instance.links.registry.get(PEER).epoch
    for _ in range(3):
        failure = pull(here)
        assert (failure.kind, failure.status) == ("LLMPeerLostError", NYL)
    come_back(peers, port, 9, remote=remote)
    assert pull(here) is None
    # What was known of the caches of the old process does not count any more.
    assert here.colours("mine") == [9]
    assert kinds(seen, 1) == ["relinked"]
    assert here.instance.links.find(PEER).epoch != epoch


def test_pushes_and_background_transfers_link_too(here: Service, peers: Peers) -> None:
    for operation in ("push_blocks", "pull_blocks_async"):
        port = lose(here, peers)
        come_back(peers, port, 9)
        mine = here.held["mine"].cache
        result = getattr(here.manager, operation)(THEIRS, mine, [0], [0])
        if result is not None:
            assert result.synchronize().name == "LLM_SUCCESS"
        assert here.link_states() == {PEER: "linked"}
        assert here.unlink(PEER, None, force=True) == OK
        here.finish()


def test_only_where_it_is_wanted(here: Service, peers: Peers) -> None:
    port = lose(here, peers, options={"llm.AutoRelink": "0"})
    come_back(peers, port, 9)
    assert pull(here).status == NYL
    assert here.link(PEER, port) == OK
    assert pull(here) is None


def test_not_after_unlink(here: Service, peers: Peers) -> None:
    port = lose(here, peers)
    assert here.unlink(PEER, None, force=True) == OK
    come_back(peers, port, 9)
    failure = pull(here)
    assert (failure.kind, failure.status) == ("LLMNotLinkedError", NYL)


def test_unlink_while_it_is_being_linked(
    here: Service, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = lose(here, peers)
    come_back(peers, port, 9)
    on_answer = Handshake.on_answer

    def unlinked_meanwhile(self: Handshake, route: object, body: object) -> None:
        link = here.instance.links.registry
        link.end(link.get(PEER), type(link.get(PEER).state).UNLINKED, "test")
        on_answer(self, route, body)  # type: ignore[arg-type]

    monkeypatch.setattr(Handshake, "on_answer", unlinked_meanwhile)
    assert pull(here).status == NYL
    assert here.link_states() == {}


def test_the_deadline_of_the_call_bounds_it(here: Service, peers: Peers) -> None:
    """At the old address somebody accepts connections and says nothing."""
    peer = peers()
    port = start_peer(peer, 5)
    start_here(here)
    assert here.link(PEER, port) == OK
    with peer.stopped():
        here.lose(PEER, port)
        for _ in range(3):
            started = time.monotonic()
            assert pull(here, timeout=150).status == NYL
            assert time.monotonic() - started < 10
    assert eventually(lambda: pull(here) is None)


def test_another_instance_at_the_old_address_is_not_linked(here: Service, peers: Peers) -> None:
    port = lose(here, peers)
    stranger = peers()
    stranger.call("start", 77, listen=f"127.0.0.1:{port}")
    assert pull(here).status == NYL
    assert stranger.call("link_states") == {}


def test_many_threads_make_one_link(here: Service, peers: Peers) -> None:
    port = lose(here, peers)
    seen = events_of(here)
    come_back(peers, port, 9)
    for number in range(8):
        here.allocate(f"m{number}", 2, 4, 64, paged=True)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda number: pull(here, f"m{number}"), range(8)))
    assert results == [None] * 8
    assert kinds(seen, 1) == ["relinked"]


def test_both_sides_link_again_at_once(here: Service, peers: Peers) -> None:
    """Each has dialed the other once and lost it; one link comes of it."""
    peer = peers()
    port = start_here(here)
    here.allocate("room", 2, 4, 64, paged=True)
    port_there = start_peer(peer, 5)
    assert here.link(PEER, port_there) == OK
    for _ in range(5):
        for lose_it in (lambda: here.lose(PEER, port_there), lambda: peer.call("lose", ME, port)):
            lose_it()
        peer.begin("relink", ME)
        here.relink(PEER)
        peer.answer()
        assert eventually(lambda: here.link_states() == {PEER: "linked"})
        assert eventually(lambda: peer.call("link_states") == {ME: "linked"})
        assert eventually(lambda: pull(here) is None)


def test_a_link_that_only_one_side_has_lost(here: Service, peers: Peers) -> None:
    """The other still thinks that it is linked: the old link makes room."""
    peer = peers()
    port = start_peer(peer, 5)
    start_here(here)
    assert here.link(PEER, port) == OK
    link = here.instance.links.find(PEER)
    # Nothing is said, and the connection stays.
    link.hang_up = lambda: None
    here.instance.links.registry.end_but_keep_leases(link, LinkState.LOST, "test")
    assert peer.call("link_states") == {ME: "linked"}
    assert pull(here) is None
    assert peer.call("link_states") == {ME: "linked"}
    with pytest.raises(LLMException):
        link.check_linked()


def test_an_interrupted_turn_is_not_lost(here: Service, peers: Peers) -> None:
    """Ctrl-C comes when a thread has the turn to link anew, before it can say that it has."""
    port = lose(here, peers)
    link = here.instance.links.registry.get(PEER)
    taken = RelinkTurn()
    assert _take(link.relink, taken, Deadline.after_ms(100))
    assert not _take(link.relink, RelinkTurn(), Deadline.after_ms(20))
    # Its holder's frame is gone.
    del taken
    come_back(peers, port, 9)
    assert eventually(lambda: pull(here) is None)
    assert here.colours("mine") == [9]
