# SPDX-License-Identifier: Apache-2.0
"""link_clusters links all of its peers at once, against one deadline."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.helpers import ME, PEER, Peers
from tests.peers import Peer, Service, settle, spawn
from tests.scale.many import Many, infos
from tests.transfer.helpers import free_port

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
    addresses = [(PEER, sleeper.ask("start", PEER))]
    addresses += many.ask("start_many", OTHERS[0], len(OTHERS))
    linked = dict.fromkeys(OTHERS, "linked")
    with ThreadPoolExecutor(1) as pool:
        with sleeper.stopped():
            work = pool.submit(link_all, here, addresses, 60_000)
            assert settle(lambda: here.link_states() == linked, 30)
            assert not work.done()
        # It wakes up in time.
        assert work.result(60) == ("LLM_SUCCESS", ["LLM_SUCCESS", *SUCCESS])


def test_one_deadline_for_all(here: Service, peers: Peers, many: Peer) -> None:
    here.start(ME)
    sleeper = peers()
    addresses = [(PEER, sleeper.ask("start", PEER)), (3, free_port())]
    addresses += many.ask("start_many", OTHERS[0], len(OTHERS))
    with sleeper.stopped():
        overall, each = link_all(here, addresses, 3000)
        assert overall in each
        assert each == ["LLM_TIMEOUT", "LLM_LINK_FAILED", *SUCCESS]
        assert here.link_states() == dict.fromkeys(OTHERS, "linked")
