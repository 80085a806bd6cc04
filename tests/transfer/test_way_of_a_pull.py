# SPDX-License-Identifier: Apache-2.0
"""How much Python of ours a pull of one block passes: functions, and the files they are in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch

import llm_datadist_torch
from llm_datadist_torch import BlocksCacheKey
from tests.peers import Peer, Service

KEY = BlocksCacheKey(2)
PACKAGE = str(Path(llm_datadist_torch.__file__).parent)


def passed(call: Callable[[], object]) -> set[CodeType]:
    """Our functions that a call passes in this thread."""
    codes: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            codes.add(frame.f_code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return codes


def number_of_calls(call: Callable[[], object]) -> int:
    """How often a call calls functions of Python, ours and others', in this thread."""
    events: list[str] = []
    sys.setprofile(lambda _, event, __: events.append(event))
    try:
        call()
    finally:
        sys.setprofile(None)
    return events.count("call")


@pytest.mark.host_memory_only
@pytest.mark.parametrize(
    ("remote", "functions", "files"), [(True, 45, 12), (False, 50, 20)], ids=["known", "two-sided"]
)
def test_a_pull_of_one_block(
    here: Service, peers: Callable[[], Peer], remote: bool, functions: int, files: int
) -> None:
    here.start(1, remote=remote)
    peer = peers()
    assert here.link(2, peer.call("start", 2, remote=remote)) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    peer.call("allocate", "theirs", 1, 8, 4096, paged=True, keys=KEY)
    peer.call("paint", "theirs", 3)
    here.allocate("mine", 1, 8, 4096, paged=True)
    manager, cache = here.manager, here.held["mine"].cache
    for _ in range(2):
        manager.pull_blocks(KEY, cache, [3], [5])
    # Now and then, one has the I/O thread look after what interrupts may leave.
    pulls = [passed(lambda: manager.pull_blocks(KEY, cache, [4], [6])) for _ in range(3)]
    codes = min(pulls, key=len)
    assert cache.tensors[0][6].unique().tolist() == [3]
    names = sorted(f"{Path(code.co_filename).name}: {code.co_qualname}" for code in codes)
    assert len(codes) <= functions, names
    assert len({code.co_filename for code in codes}) <= files, names


@pytest.mark.host_memory_only
def test_the_number_of_blocks_makes_no_more_python(
    here: Service, peers: Callable[[], Peer]
) -> None:
    here.start(1, remote=True)
    peer = peers()
    assert here.link(2, peer.call("start", 2, remote=True)) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    peer.call("allocate", "theirs", 2, 2000, 64, paged=True, keys=KEY)
    here.allocate("mine", 2, 2000, 64, paged=True)
    manager, cache = here.manager, here.held["mine"].cache

    def calls(count: int) -> int:
        ids = torch.arange(0, 2 * count, 2)
        manager.pull_blocks(KEY, cache, ids, ids)
        return number_of_calls(lambda: manager.pull_blocks(KEY, cache, ids, ids))

    assert calls(1000) == calls(100) == calls(10)
