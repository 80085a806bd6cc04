# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in the middle of a call: nothing is left behind, and the link stays usable."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from llm_datadist_torch import BlocksCacheKey
from llm_datadist_torch.links.link import Pending
from tests.peers import Peer, Ref, Service, settle

KEY = BlocksCacheKey(2)


@pytest.fixture
def peer(here: Service, peers: Callable[[], Peer]) -> Peer:
    """Linked with ``here``; its cache "theirs" has KEY, and "mine" is to be pulled into."""
    # Who is stopped stays linked, however slow the machine is.
    here.start(1, options={"llm.HeartbeatInterval": "0"})
    made = peers()
    assert here.link(2, made.ask("start", 2)) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    made.ask("allocate", "theirs", 2, 8, 4096, paged=True, keys=KEY)
    made.ask("paint", "theirs", 3)
    here.allocate("mine", 2, 8, 4096, paged=True)
    here.paint("mine", 1)
    return made


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Also where the test run was started in the background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def nothing_is_left(here: Service, peer: Peer) -> bool:
    return settle(
        lambda: peer.ask("counters")["leases"] == peer.ask("counters")["grants"] == 0
    ) and (here.counters()["leases"] == 0)


def test_while_the_owner_is_silent(here: Service, peer: Peer) -> None:
    link = here.instance.links.registry.get(2)

    def interrupt() -> None:
        # A signal that nobody waits for would end the test run.
        if settle(lambda: bool(link._pending)):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with peer.stopped():
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            here.run("pull_blocks", KEY, Ref("mine"), [0], [0], timeout=60_000)
        thread.join()
    assert nothing_is_left(here, peer)
    assert here.held["mine"].cache.tensors[0].cpu().unique().tolist() == [1]
    here.run("pull_blocks", KEY, Ref("mine"), [0], [0])
    assert here.held["mine"].cache.tensors[0][0].cpu().unique().tolist() == [3]


def test_in_the_moment_in_which_the_answer_comes(
    here: Service, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer brings a lease that nobody would return."""
    wait = Pending.wait

    def interrupted(self: Pending, deadline: object) -> None:
        assert wait(self, deadline) is not None  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pending, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            here.run("pull_blocks", KEY, Ref("mine"), [0], [0])
    assert nothing_is_left(here, peer)
    here.run("pull_blocks", KEY, Ref("mine"), [0], [0])
