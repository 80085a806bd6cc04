# SPDX-License-Identifier: Apache-2.0
"""Calls with a time limit of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llm_datadist_torch import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMException,
)
from llm_datadist_torch import TransferWithCacheKeyConfig as Config
from llm_datadist_torch.links.link import Link
from tests.faults.helpers import OK, PEER, THEIRS, TIMEOUT, Peers, start_peer
from tests.peers import Peer, Ref, Service, eventually
from tests.transfer.tables import TABLE, WAIT_MS, members

ROW = CacheKeyByIdAndIndex(PEER, 2, 0)
BLOCKS = (THEIRS, Ref("mine"), [0, 1], [0, 1])
CALLS = {
    "pull_blocks": BLOCKS,
    "push_blocks": BLOCKS,
    "pull_cache": (ROW, Ref("row")),
    "push_cache": (ROW, Ref("row")),
}


@pytest.fixture
def peer(here: Service, peers: Peers) -> Peer:
    """Its calls may take 20 s, and it sleeps whenever the test likes."""
    peer = peers()
    here.start(1)
    here.allocate("mine", 2, 4, 64, paged=True)
    here.allocate("row", 2, 1, 64, paged=False)
    port = start_peer(peer, 5)
    peer.call("allocate", "rows", 2, 2, 64, paged=False)
    assert here.link(PEER, port) == OK
    return peer


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_its_own_time(here: Service, peer: Peer, call: str) -> None:
    with peer.stopped():
        started = time.monotonic()
        failure = here.attempt(call, *CALLS[call], timeout=50)
        assert failure.status == TIMEOUT
        assert "50 ms" in failure.text
        task = getattr(here.manager, f"{call}_async")(*map(here._real, CALLS[call]), timeout=60)
        assert task.synchronize().name == TIMEOUT
        assert time.monotonic() - started < 10
    # The link is as it was, and the leases granted too late come back.
    assert here.attempt(call, *CALLS[call], timeout=20_000) is None
    assert eventually(lambda: not peer.call("counters")["leases"])


def test_layer_by_layer(here: Service, peer: Peer) -> None:
    class Ready(LayerSynchronizer):
        def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
            return True

    config = Config(BlocksCacheKey(PEER, 0), range(1), range(1))
    cache = here.held["mine"].cache
    with peer.stopped():
        task = here.manager.transfer_cache_async(cache, Ready(), [config], [0], [0], timeout=50)
        assert task.synchronize().name == TIMEOUT
    task = here.manager.transfer_cache_async(cache, Ready(), [config], [0], [0], timeout=20_000)
    assert task.synchronize().name == "LLM_SUCCESS"


@pytest.mark.parametrize(
    ("timeout", "kind"),
    [(0, "LLMParamError"), (-1, "LLMParamError"), (2**31, "ValueError"), ("1", "TypeError"),
     (1.5, "TypeError")],
)  # fmt: skip
@pytest.mark.parametrize("call", [*CALLS, *(f"{call}_async" for call in CALLS)])
def test_what_is_no_time(here: Service, peer: Peer, call: str, timeout: object, kind: str) -> None:
    failure = here.attempt(call, *CALLS[call.removesuffix("_async")], timeout=timeout)
    assert failure.kind == kind
    assert "timeout" in failure.text


def test_unregister(here: Service, peer: Peer) -> None:
    cache_id = here.register("given", 2, 4, 64, paged=True)
    with here.instance.using(here.held["given"].cache):
        failure = here.attempt("unregister_cache", cache_id, timeout=50)
        assert failure.status == TIMEOUT
        assert "50 ms" in failure.text
    assert here.attempt("unregister_cache", cache_id, timeout=20_000) is None
    assert here.held["given"].cache.ended


@contextmanager
def transfer_on(link: Link) -> Iterator[None]:
    """A transfer of this side that takes as long as the block does."""
    ticket = threading.Lock()
    with ticket:
        link.transfers.running.add(ticket)
        yield


@pytest.fixture
def patient() -> Iterator[Service]:
    """An instance of this process that waits for transfers longer than any test may take."""
    service = Service()
    service.start(8, timeout_ms=3_600_000)
    yield service
    service.finish()


def test_unlink_of_a_communicator(peer: Peer, patient: Service) -> None:
    peer.begin("link_by_table", "pair", members(PEER, 8), TABLE, WAIT_MS)
    comm_id = patient.link_by_table("pair", members(PEER, 8), TABLE, WAIT_MS)
    peer.answer()
    with transfer_on(patient.instance.links.find(PEER)):
        with pytest.raises(LLMException) as caught:
            patient.dd.unlink(comm_id, timeout=50)
        assert caught.value.status_code.name == "LLM_UNLINK_FAILED"
        assert patient.link_states() == {PEER: "linked"}
    patient.dd.unlink(comm_id, timeout=20_000)
    assert patient.link_states() == {}


def test_finalize(here: Service, peer: Peer, patient: Service) -> None:
    assert patient.link(1, here.listening()[1]) == OK
    link = patient.instance.links.find(1)
    for wrong in (0, "1"):
        with pytest.raises((LLMException, TypeError)):
            patient.dd.finalize(timeout=wrong)
    assert patient.link_states() == {1: "linked"}
    with transfer_on(link):
        # Who is moving bytes is not waited for any longer; it fails.
        patient.dd.finalize(timeout=50)
    assert link.state.value == "unlinked"
    assert eventually(lambda: here.link_states() == {PEER: "linked"})


@pytest.mark.parametrize("timeout", [0, -1, 2**31, "1", 1.5])
def test_what_is_no_time_to_end_something(here: Service, peer: Peer, timeout: object) -> None:
    cache_id = here.register("given", 2, 4, 64, paged=True)
    for call in (
        lambda: here.dd.unlink(1, timeout=timeout),
        lambda: here.manager.unregister_cache(cache_id, timeout=timeout),
    ):
        with pytest.raises((ValueError, TypeError), match="timeout"):
            call()
    assert not here.held["given"].cache.ended
