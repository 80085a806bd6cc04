# SPDX-License-Identifier: Apache-2.0
"""The peer's pid belongs to another process by now: its memory is not touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from llm_datadist_torch import BlocksCacheKey
from tests.peers import Peer, Ref, Service

KEY = BlocksCacheKey(2)


@pytest.fixture
def stranger() -> Iterator[int]:
    """The pid of a process that has nothing to do with anything."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    yield process.pid
    process.kill()
    process.communicate()


def test_bytes_go_to_the_peer_and_not_to_its_pid(
    here: Service, peers: Callable[[], Peer], stranger: int
) -> None:
    here.start(1)
    peer = peers()
    peer.ask("claim_pid", stranger)
    assert here.link(2, peer.ask("start", 2)) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    peer.ask("register", "theirs", 1, 4, 4096, paged=True, keys=KEY)
    peer.ask("paint", "theirs", 1)
    here.register("mine", 1, 4, 4096, paged=True)
    here.paint("mine", 77)
    here.note_ways()
    here.run("push_blocks", KEY, Ref("mine"), [0], [2], tensor_num_per_layer=1)
    here.paint("mine", 0)
    here.run("pull_blocks", KEY, Ref("mine"), [2], [0])
    assert here.held["mine"].cache.tensors[0][0].unique().tolist() == [77]
    ways, warnings = here.noted()
    assert ways == ["relay", "relay"]
    assert any(f"process {stranger} is not the peer" in text for text in warnings), warnings
