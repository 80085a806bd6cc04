# SPDX-License-Identifier: Apache-2.0
"""Bytes that go through the owner: a cache that is known is claimed with the request itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import torch

from llm_datadist_torch import BlocksCacheKey, CacheKey
from llm_datadist_torch.serving import messages
from llm_datadist_torch.serving.owner import MAX_LEASES, Owner
from tests.peers import Peer, Ref, Service, eventually
from tests.transfer.remote import ME, PEER, SIZE, THEIRS, pull, status
from tests.transfer.remote import messages as said_by
from tests.transfer.test_hostile_input import hello, request
from tests.wire import Speaker, stranger

pytestmark = pytest.mark.host_memory_only

PRIVATE = BlocksCacheKey(ME, 1)
WANTED = messages.Resolve("blocks", 0, 0, True, False)
ASKS, KNOWS = ["Resolve", "ReadBytes", "Release"], ["ReadBytes"]


@pytest.fixture
def peer(here: Service, remote_peer: Peer) -> Peer:
    """Whose bytes all go through the connection."""
    here.only_relay(PEER)
    return remote_peer


@contextmanager
def linked_stranger(here: Service, *, remote: bool = True) -> Iterator[Speaker]:
    """This instance has an open cache, under WANTED; somebody is linked with it."""
    port = here.start(ME, remote=remote)
    here.allocate("open", 2, 4, 64, paged=True, keys=BlocksCacheKey(ME, 0))
    with stranger(port) as dealer:
        assert isinstance(request(dealer, hello(3, remote_accessible=remote)), messages.Welcome)
        yield dealer


def give_back(dealer: Speaker, view: Any) -> None:
    release = messages.Release(view.lease_id, None)
    dealer.send(messages.encode(messages.Envelope(0, False, release)))


def test_one_message_is_enough(here: Service, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    with said_by(monkeypatch) as said:
        for colour in (8, 9, 10):
            peer.call("paint", "theirs", colour)
            assert pull(here) is None
            assert here.colours("mine") == [colour]
    assert said == ASKS + KNOWS * 2
    assert peer.call("counters")["leases"] == 0


def test_a_claim_on_another_cache_is_refused(
    here: Service, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pull(here) is None
    with said_by(monkeypatch) as said:
        for colour in (9, 10):
            peer.call("drop", "theirs")
            assert status(pull(here)) == "LLM_KV_CACHE_NOT_EXIST"
            peer.call("allocate", "theirs", *SIZE, paged=True, keys=THEIRS)
            peer.call("paint", "theirs", colour)
            assert pull(here) is None
            peer.call("drop", "theirs")
            peer.call("allocate", "theirs", *SIZE, paged=True, keys=THEIRS)
            peer.call("paint", "theirs", colour + 10)
            assert pull(here) is None
            assert here.colours("mine") == [colour + 10]
    assert said == [*KNOWS, "Resolve", *ASKS, *KNOWS, *ASKS] * 2
    assert eventually(lambda: peer.call("counters")["leases"] == 0)


def test_a_claim_proves_nothing_where_bytes_do_not_go_through_the_owner(
    here: Service, remote_peer: Peer
) -> None:
    """The next pull may go another way; then the peer's counters count."""
    keys = CacheKey(PEER, req_id=5), CacheKey(PEER, req_id=6)
    here.allocate("row", 2, 1, 4096, paged=False)
    remote_peer.call("allocate", "first", 2, 2, 4096, paged=False, keys=keys)
    remote_peer.call("paint", "first", 4)
    link = here.instance.links.find(PEER).channel
    channel = link._channels["local"]
    paths = channel._paths
    here.only_relay(PEER)
    assert here.attempt("pull_cache", keys[0], Ref("row")) is None
    assert here.colours("row") == [4]
    # The first cache stays, by its other key, and with it its memory.
    remote_peer.call("run", "remove_cache_key", keys[0])
    remote_peer.call("allocate", "second", 2, 1, 4096, paged=False, keys=keys[:1])
    remote_peer.call("paint", "second", 5)
    channel._paths = paths
    link._bind()
    assert here.attempt("pull_cache", keys[0], Ref("row")) is None
    assert here.colours("row") == [5]


# -- a peer that claims what it may not ------------------------------------------------------------


def claimed(ask_for: messages.Resolve, view: Any, **other: Any) -> messages.ReadBytes:
    address = int(torch.frombuffer(bytearray(view.addrs), dtype=torch.int64)[0])
    claim = messages.Claim(ask_for, view.cache_id, view.row)
    span = torch.tensor([address, 64]).numpy().tobytes()
    return messages.ReadBytes(0, span, msgspec.structs.replace(claim, **other))


@pytest.mark.parametrize("remote", [True, False])
def test_claims_of_strangers(here: Service, remote: bool) -> None:
    with linked_stranger(here, remote=remote) as dealer:
        closed = "private" if remote else "open"
        if remote:
            here.register("private", 2, 4, 64, paged=True, keys=PRIVATE, accessible=False)
        view = request(dealer, WANTED)
        assert isinstance(view, messages.CacheView)
        good = request(dealer, claimed(WANTED, view))
        # Two-sided pulls consume keys: that takes a lease.
        assert isinstance(good, messages.Done) == remote
        for bad in (
            claimed(WANTED, view, cache_id=view.cache_id + 1),
            claimed(WANTED, view, row=1),
            claimed(msgspec.structs.replace(WANTED, write=True), view),
            claimed(msgspec.structs.replace(WANTED, index=1), view, cache_id=view.cache_id + 1),
            claimed(msgspec.structs.replace(WANTED, index=1), view, cache_id=here.cache_id(closed)),
            claimed(msgspec.structs.replace(WANTED, kind="nothing"), view),
            claimed(msgspec.structs.replace(WANTED, paged=False), view),
        ):
            answer = request(dealer, bad)
            assert isinstance(answer, messages.Refused), bad
        call = messages.Call(0, "nothing", b"", messages.Claim(WANTED, view.cache_id, 0))
        for _ in range(3):
            assert isinstance(request(dealer, call), messages.Refused)
        # None of them has left a lease.
        assert here.counters()["leases"] == 1


def test_the_lease_of_a_claim_lasts_as_long_as_the_request(
    here: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def noted(owner: Owner, *args: Any) -> bytes:
        held.append(here.counters()["leases"])
        return read(owner, *args)

    read = Owner._read_leased
    monkeypatch.setattr(Owner, "_read_leased", noted)
    with linked_stranger(here) as dealer:
        view = request(dealer, WANTED)
        give_back(dealer, view)
        assert isinstance(request(dealer, claimed(WANTED, view)), messages.Done)
        assert held == [1]
        assert here.counters()["leases"] == 0


def test_too_many_leases_leave_none_to_claim(here: Service) -> None:
    with linked_stranger(here) as dealer:
        for _ in range(MAX_LEASES):
            view = request(dealer, WANTED)
        assert isinstance(request(dealer, claimed(WANTED, view)), messages.Refused)
        give_back(dealer, view)
        assert isinstance(request(dealer, claimed(WANTED, view)), messages.Done)


def test_an_owner_that_is_leaving_takes_no_claim(here: Service) -> None:
    with linked_stranger(here) as dealer:
        view = request(dealer, WANTED)
        link = here.instance.links.find(3)
        link.leaving = True
        assert isinstance(request(dealer, claimed(WANTED, view)), messages.Refused)
        link.leaving = False
        assert isinstance(request(dealer, claimed(WANTED, view)), messages.Done)
        assert len(link.grants) == 1


@pytest.mark.parametrize("operation", ["pull_blocks", "push_blocks"])
def test_an_answer_of_another_kind_is_no_success(
    here: Service, remote_peer: Peer, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """The owner answers a relayed read or write with what is none of its answers."""
    key = BlocksCacheKey(ME, 0)
    here.allocate("open", *SIZE, paged=True, keys=key)
    remote_peer.call("only_relay", ME)
    answer = Owner.answer

    def bent(self: Owner, link: Any, body: Any, data: Any) -> Any:
        found = answer(self, link, body, data)
        relayed = isinstance(body, (messages.ReadBytes, messages.WriteBytes))
        return (messages.Answer(b""), found[1]) if relayed and found else found

    monkeypatch.setattr(Owner, "answer", bent)
    failure = remote_peer.call("attempt", operation, key, Ref("theirs"), [0], [0])
    assert failure is not None
    assert failure.status == "LLM_FAILED"
    assert "unexpected answer Answer" in failure.text
