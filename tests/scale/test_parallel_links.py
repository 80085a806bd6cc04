# SPDX-License-Identifier: Apache-2.0
"""link_clusters links all of its peers at once, against one deadline."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llm_datadist_torch.links.table import LinkTable
from tests.faults.helpers import ME, PEER, Peers
from tests.peers import Peer, Service, eventually, spawn
from tests.scale.many import Many, infos
from tests.transfer.helpers import free_port

pytestmark = pytest.mark.thorough

OTHERS = list(range(1000, 1015))
SUCCESS = ["LLM_SUCCESS"] * len(OTHERS)


@pytest.fixture
def many() -> Iterator[Peer]:
    peer = spawn(Many)
    yield peer
    peer.close()


def link_all(
    here: Service, addresses: list[tuple[int, int]], timeout: int
) -> tuple[str, list[str]]:
    overall, each = here.dd.link_clusters(infos(addresses), timeout)
    return overall.name, [status.name for status in each]


def test_one_that_hangs_does_not_hold_up_the_others(
    here: Service, peers: Peers, many: Peer
) -> None:
    here.start(ME)
    sleeper = peers()
    # The first in the list.
    addresses = [(PEER, sleeper.call("start", PEER))]
    addresses += many.call("start_many", OTHERS[0], len(OTHERS))
    linked = dict.fromkeys(OTHERS, "linked")
    with ThreadPoolExecutor(1) as pool:
        with sleeper.stopped():
            work = pool.submit(link_all, here, addresses, 60_000)
            assert eventually(lambda: here.link_states() == linked, 30)
            assert not work.done()
        # It wakes up in time.
        assert work.result(60) == ("LLM_SUCCESS", ["LLM_SUCCESS", *SUCCESS])


def test_one_deadline_for_all(here: Service, peers: Peers, many: Peer) -> None:
    here.start(ME)
    sleeper = peers()
    addresses = [(PEER, sleeper.call("start", PEER)), (3, free_port())]
    addresses += many.call("start_many", OTHERS[0], len(OTHERS))
    with sleeper.stopped():
        overall, each = link_all(here, addresses, 3000)
        assert overall in each
        assert each == ["LLM_TIMEOUT", "LLM_LINK_FAILED", *SUCCESS]
        assert here.link_states() == dict.fromkeys(OTHERS, "linked")


def test_who_stays_hears_nothing_of_who_goes(
    here: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instance asks nobody but the one whose connection has ended whether it is there."""
    port = here.start(ME)
    others = [Service() for _ in range(4)]
    try:
        for number, other in enumerate(others):
            other.start(10 + number)
            assert other.link(ME, port)[0] == "LLM_SUCCESS"
        heard: list[int] = []
        on_message = LinkTable.on_message

        def noted(table: LinkTable, *args: Any) -> None:
            heard.append(table.identity.cluster_id)
            on_message(table, *args)

        monkeypatch.setattr(LinkTable, "on_message", noted)
        goes = others.pop()
        # Without a word.
        goes.instance.links.endpoint.close()
        assert eventually(lambda: here.link_states()[13] == "lost")
        assert eventually(lambda: not any(here.instance.links.endpoint.loop.timers._times.values()))
        assert heard == []
        assert here.link_states() == {10: "linked", 11: "linked", 12: "linked", 13: "lost"}
        goes.finish()
    finally:
        for other in others:
            other.finish()
