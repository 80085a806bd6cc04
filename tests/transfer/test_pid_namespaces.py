# SPDX-License-Identifier: Apache-2.0
"""Peers in other PID namespaces, as in the containers of one pod: regions come as descriptors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llm_datadist_torch import BlocksCacheKey
from llm_datadist_torch.serving.owner import Owner
from llm_datadist_torch.values.status import LLMStatusCode, error_for
from tests.peers import Peer, Ref, Service, eventually, spawn_hidden

pytestmark = [pytest.mark.needs_netns, pytest.mark.host_memory_only]

ME, ONE, TWO = 1, 2, 3
SIZE = (2, 8, 65536)
KEYS = {number: BlocksCacheKey(number) for number in (ME, ONE, TWO)}


@pytest.fixture
def hidden() -> Iterator[tuple[Peer, Peer]]:
    """Two peers that see neither each other nor us; both have the pid 1."""
    both = spawn_hidden(), spawn_hidden()
    yield both
    for peer in both:
        peer.close()


@pytest.mark.parametrize("remote", [False, True], ids=["two-sided", "known"])
def test_regions_are_mapped(hidden: tuple[Peer, Peer], remote: bool) -> None:
    one, two = hidden
    port = one.call("start", ONE, remote=remote)
    two.call("start", TWO, remote=remote)
    assert one.call("own_pid") == two.call("own_pid") == 1
    assert two.call("link", ONE, port) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    one.call("make", "allocated", "theirs", *SIZE, paged=True, keys=KEYS[ONE])
    two.call("make", "allocated", "mine", *SIZE, paged=True, keys=KEYS[TWO])
    reason = two.call("reason", ONE)
    assert "another PID namespace" in reason
    assert two.call("identified_by", ONE) == "pidfd"
    for colour in (5, 6):
        one.call("paint", "theirs", colour)
        two.call("run", "pull_blocks", KEYS[ONE], Ref("mine"), [0, 1], [2, 3])
        assert two.call("colours", "mine") == sorted({0, colour})
    two.call("paint", "mine", 9)
    two.call("run", "push_blocks", KEYS[ONE], Ref("mine"), [0], [0])
    assert one.call("colours", "theirs") == [6, 9]
    assert two.call("paths") == {"shared-mapping"}
    # A new cache in place of the old one, and one that its user has registered.
    one.call("drop", "theirs")
    assert eventually(lambda: two.call("mapped_bytes", ONE) < 2 * SIZE[1] * SIZE[2])
    one.call("make", "tensors", "theirs", *SIZE, paged=True, keys=KEYS[ONE])
    one.call("paint", "theirs", 7)
    two.call("run", "pull_blocks", KEYS[ONE], Ref("mine"), [0], [0])
    assert two.call("rows", "mine")[0][0] == 7
    assert two.call("paths") == {"shared-mapping", "relay"}


def test_seen_from_one_side_only(here: Service, hidden: tuple[Peer, Peer]) -> None:
    """The host sees processes of its containers, and reaches them as any other."""
    here.start(ME)
    port = hidden[0].call("start", ONE)
    assert here.link(ONE, port) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    for kind, path in (("allocated", "shared-mapping"), ("tensors", "process-memory")):
        hidden[0].call("make", kind, kind, *SIZE, paged=True, keys=KEYS[ONE])
        hidden[0].call("paint", kind, 5)
        here.make("allocated", "mine", *SIZE, paged=True, keys=KEYS[ME])
        here.run("pull_blocks", KEYS[ONE], Ref("mine"), [0], [0])
        assert here.rows("mine")[0][0] == 5
        assert path in here.paths()
        hidden[0].call("run", "push_blocks", KEYS[ME], Ref(kind), [0], [1])
        assert here.rows("mine")[0][1] == 5
        hidden[0].call("drop", kind)
        here.drop("mine")


def test_who_gets_none_is_served_by_the_control_connection(
    here: Service, hidden: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error_for(LLMStatusCode.LLM_FEATURE_NOT_ENABLED, "not to you")

    monkeypatch.setattr(Owner, "share_region", refuse)
    port = here.start(ME)
    hidden[0].call("start", ONE)
    assert hidden[0].call("link", ME, port) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    here.make("allocated", "theirs", *SIZE, paged=True, keys=KEYS[ME])
    here.paint("theirs", 4)
    hidden[0].call("make", "allocated", "mine", *SIZE, paged=True)
    hidden[0].call("run", "pull_blocks", KEYS[ME], Ref("mine"), [0], [0])
    assert hidden[0].call("rows", "mine")[0][0] == 4
    assert hidden[0].call("paths") == {"relay"}
