# SPDX-License-Identifier: Apache-2.0
"""The end of a connection is not the end of a peer: what it may still write to stays its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_datadist_torch import BlocksCacheKey, LLMException, LLMOutOfMemoryError
from llm_datadist_torch.links.table import LinkTable
from llm_datadist_torch.serving.messages import Release
from llm_datadist_torch.serving.owner import Owner
from tests.faults.helpers import ME, OK, PEER, Peers
from tests.peers import Peer, Ref, Service, eventually

pytestmark = pytest.mark.host_memory_only

POOL = '{"memory_size": 131072, "page_shift": 16}'
"""Room for the two tensors of one cache."""
MINE = BlocksCacheKey(ME, 0)


@pytest.fixture(params=["pidfd", "pid and start time"])
def writer(request: pytest.FixtureRequest, here: Service, peers: Peers) -> Peer:
    """Pushes into "mine" for seconds; the connection has been cut meanwhile."""
    port = here.start(ME, pool=POOL)
    peer = peers()
    if request.param != "pidfd":
        peer.call("have_no_pidfd")
    peer.call("start", PEER)
    assert peer.call("link", ME, port) == OK
    (info,) = here.dd.links()
    assert (info.identified_by, info.not_local) == (request.param, "")
    peer.call("allocate", "theirs", 2, 2, 64, paged=True)
    peer.call("paint", "theirs", 9)
    here.allocate("mine", 2, 2, 64, paged=True, keys=MINE)
    here.paint("mine", 1)
    return peer


@pytest.fixture
def cut_while_it_writes(here: Service, writer: Peer, tmp_path: Path) -> Callable[..., None]:
    def cut(seconds: float = 2.0) -> None:
        begun = tmp_path / "begun"
        writer.call("slow_moves", seconds, str(begun))
        writer.begin("attempt", "push_blocks", MINE, Ref("theirs"), [0, 1], [0, 1])
        # Here the lease is known before the writer has heard of it.
        assert eventually(begun.exists)
        here.cut()
        assert eventually(lambda: here.link_states() == {PEER: "lost"})
        kept = here.dd.stats().quarantine
        assert (kept.leases, kept.caches, kept.nbytes) == (1, 1, 2 * 2 * 64)

    return cut


def full(here: Service) -> bool:
    try:
        here.allocate("new", 2, 2, 64, paged=True)
    except LLMOutOfMemoryError:
        return True
    return False


def test_its_pages_go_to_nobody_before_it_has_stopped(
    here: Service, writer: Peer, cut_while_it_writes: Callable[..., None]
) -> None:
    cut_while_it_writes()
    here.drop("mine")
    assert full(here)
    writer.answer()
    # It has written, and has nobody to say so to; then it links again.
    assert full(here)
    writer.call("relink", ME)
    assert eventually(lambda: not full(here))
    assert here.dd.stats().quarantine.leases == 0


def test_a_lease_that_the_writer_never_heard_of(
    here: Service, writer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer was lost with the connection: the next link says that nobody uses it."""
    lease, given = Owner._lease, []

    def cut_off(self: Owner, *args: Any, **kwargs: Any) -> int:
        given.append(lease(self, *args, **kwargs))
        here.cut()
        return given[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Owner, "_lease", cut_off)
        writer.call("attempt", "push_blocks", MINE, Ref("theirs"), [0, 1], [0, 1], timeout=1000)
        # Of several, because the writer links again by itself, all but the last may be over by now.
        assert eventually(lambda: given)
    here.drop("mine")
    writer.call("relink", ME)
    assert eventually(lambda: not full(here))
    assert here.instance.links.registry.late_writers.leases == 0


def test_a_return_that_was_lost(
    here: Service,
    writer: Peer,
    cut_while_it_writes: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The writer has finished and says so, but is not heard."""
    serve = LinkTable._serve

    def hear_no_release(self: LinkTable, link: Any, connection: Any, envelope: Any) -> None:
        if not isinstance(envelope.body, Release):
            serve(self, link, connection, envelope, None)

    cut_while_it_writes()
    writer.answer()
    monkeypatch.setattr(LinkTable, "_serve", lambda *args: hear_no_release(*args[:4]))
    writer.call("relink", ME)
    assert eventually(lambda: here.instance.links.registry.late_writers.leases == 0)


def test_what_still_writes_stays_over_the_next_link(
    here: Service, writer: Peer, cut_while_it_writes: Callable[..., None]
) -> None:
    """The writer links again while it writes: its lease is not taken for a lost one."""
    port = writer.call("listening_port")
    cut_while_it_writes(10.0)
    here.drop("mine")
    assert here.link(PEER, port) == OK
    assert full(here)
    writer.answer()
    assert eventually(lambda: not full(here))


def test_its_pages_are_free_when_it_has_died(
    here: Service, writer: Peer, cut_while_it_writes: Callable[..., None]
) -> None:
    cut_while_it_writes()
    here.drop("mine")
    with writer.stopped():
        assert full(here)
        writer.kill()
        assert eventually(lambda: not full(here))
    here.paint("new", 2)
    assert here.colours("new") == [2]


def test_a_registered_cache_is_not_given_back_meanwhile(
    here: Service, writer: Peer, cut_while_it_writes: Callable[..., None]
) -> None:
    """unregister_cache() says so, and finalize(), which ends everything else."""
    here.drop("mine")
    here.register("mine", 2, 2, 64, paged=True, keys=MINE)
    cut_while_it_writes()
    with pytest.raises(LLMException) as caught:
        here.manager.unregister_cache(here.cache_id("mine"), timeout=50)
    assert caught.value.status_code.name == "LLM_TIMEOUT"
    with pytest.raises(LLMException, match="it may still write there") as late:
        here.dd.finalize()
    assert late.value.status_code.name == "LLM_LINK_BUSY"
    here.dd.finalize()
    writer.answer()


def test_a_reader_that_can_not_be_heard_keeps_nothing(here: Service, writer: Peer) -> None:
    writer.call("slow_moves", 1.0)
    writer.begin("attempt", "pull_blocks", MINE, Ref("theirs"), [0, 1], [0, 1])
    assert eventually(lambda: here.counters()["leases"] == 1)
    here.cut()
    assert eventually(lambda: here.counters()["leases"] == 0)
    failure: Any = writer.answer()
    assert failure.status == "LLM_NOT_YET_LINK"
