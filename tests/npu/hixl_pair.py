# SPDX-License-Identifier: Apache-2.0
"""What the tests of the `hixl` transport share: an instance here, one elsewhere, a link."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from llm_datadist_torch import BlocksCacheKey
from tests.npu.npu_service import NpuService, spawn_npu
from tests.peers import Peer, Ref

OK = ("LLM_SUCCESS", ["LLM_SUCCESS"])
KEY, MINE = BlocksCacheKey(2, 0), Ref("mine")
Pair = tuple[NpuService, Peer, int]


@pytest.fixture
def peers() -> Iterator[Callable[[], Peer]]:
    made: list[Peer] = []

    def make() -> Peer:
        made.append(spawn_npu())
        return made[-1]

    yield make
    for peer in made:
        peer.close()


@pytest.fixture
def here() -> Iterator[NpuService]:
    service = NpuService()
    yield service
    service.mend()
    service.finish()


@pytest.fixture
def pair(request: pytest.FixtureRequest, here: NpuService, peers: Callable[[], Peer]) -> Pair:
    """Instance 1 here and 2 in another process, linked; and the port of 2."""
    arguments = getattr(request, "param", {})
    there = peers()
    port = there.call("start", 2, **arguments)
    here.start(1, **arguments)
    assert here.link(2, port) == OK
    return here, there, port


WAYS = {
    "ipc": ({"ipc": True, "options": {"llm.Transport": "local"}}, "device-ipc"),
    "hixl": ({"options": {"llm.Transport": "hixl"}}, "hixl"),
}
"""What moves device memory between processes of one host: how it is chosen, and its name."""


@pytest.fixture(params=WAYS)
def moving(
    request: pytest.FixtureRequest, here: NpuService, peers: Callable[[], Peer]
) -> Iterator[Pair]:
    """As `pair`, for each of `WAYS`; afterwards all bytes must have gone that way."""
    chosen, path = WAYS[request.param]
    there = peers()
    port = there.call("start", 2, **chosen)
    here.start(1, **chosen)
    assert here.link(2, port) == OK
    yield here, there, port
    assert here.paths() == {path}


def give(pair: Pair, rows: int = 8, row_bytes: int = 4096) -> bytes:
    """A blocks cache on each side, the peer's filled; returns its bytes."""
    here, there, _ = pair
    there.call("allocate", "theirs", 2, rows, row_bytes, paged=True, keys=KEY)
    here.allocate("mine", 2, rows, row_bytes, paged=True)
    here.paint("mine", 0)
    return there.call("fill", "theirs", 1)


def pull(here: NpuService, src=(0, 1, 2), dst=(5, 6, 7), key=KEY):
    return here.attempt("pull_blocks", key, MINE, list(src), list(dst))


def blocks(data: bytes, rows: int, row_bytes: int) -> list[list[bytes]]:
    step = rows * row_bytes
    return [
        [data[t + r * row_bytes : t + (r + 1) * row_bytes] for r in range(rows)]
        for t in range(0, len(data), step)
    ]
