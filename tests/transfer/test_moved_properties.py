# SPDX-License-Identifier: Apache-2.0
"""Random storage moves among random transfers and copies, against a model; all bytes compared.

The model knows what the tensors hold and which have moved. A use of a cache of which a tensor has
moved is refused and changes nothing; every other one moves the bytes that the tensors hold now.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_datadist_torch import BlocksCacheKey
from tests.caches import MOVES
from tests.devices import examples
from tests.peers import NearPeer, Peer, Ref, Service, spawn

COUNT, ROWS, ROW_BYTES = 4, 4, 512
IDS = {"far": 2, "near": 3}
POOL = '{"memory_size": 1048576, "page_shift": 12}'
_names = itertools.count(1)


@dataclass
class Model:
    """What a user of the cache's tensors sees: the first byte of each row, per tensor."""

    kind: str
    rows: list[list[int]] = field(default_factory=lambda: [[0] * ROWS for _ in range(COUNT)])
    moved: bool = False


@dataclass
class World:
    here: Service
    peers: dict[str, Peer | NearPeer]


@pytest.fixture(scope="module", params=[False, True], ids=["two-sided", "known"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    here = Service()
    here.start(1, remote=request.param, pool=POOL, device="cpu")
    peers: dict[str, Peer | NearPeer] = {"far": spawn(), "near": NearPeer()}
    for name, peer in peers.items():
        pool = POOL if name == "far" else None
        port = peer.call("start", IDS[name], remote=request.param, pool=pool, device="cpu")
        assert here.link(IDS[name], port)[0] == "LLM_SUCCESS"
    yield World(here, peers)
    for peer in peers.values():
        peer.close()
    here.finish()


KINDS = st.sampled_from(["allocated", "tensors"])
SIDES = st.sampled_from(["mine", "theirs"])
TENSORS = st.integers(0, COUNT - 1)
BLOCKS = st.integers(0, ROWS - 1)
STEPS = st.one_of(
    st.tuples(st.just("pull"), BLOCKS, BLOCKS),
    st.tuples(st.just("pull"), BLOCKS, BLOCKS),
    st.tuples(st.just("push"), BLOCKS, BLOCKS),
    st.tuples(st.just("copy"), SIDES, BLOCKS, BLOCKS),
    st.tuples(st.just("paint"), SIDES, TENSORS, st.integers(0, 255)),
    st.tuples(st.just("move"), SIDES, TENSORS, st.sampled_from([*MOVES, "send"])),
    st.tuples(st.just("renew"), SIDES),
)


class Run:
    """One sequence of steps with one cache on each side."""

    def __init__(self, world: World, peer: str, kinds: tuple[str, str]) -> None:
        there = world.peers[peer].call

        def here(name: str, *args: Any, **kwargs: Any) -> Any:
            return getattr(world.here, name)(*args, **kwargs)

        self._call: dict[str, Any] = {"mine": here, "theirs": there}
        self._name = f"p{next(_names)}"
        self._key = BlocksCacheKey(IDS[peer], next(_names))
        self._models = {"mine": Model(kinds[0]), "theirs": Model(kinds[1])}
        for side in self._models:
            self._make(side)

    def _make(self, side: str) -> None:
        keys = self._key if side == "theirs" else None
        kind = self._models[side].kind
        self._call[side]("make", kind, self._name, COUNT, ROWS, ROW_BYTES, paged=True, keys=keys)
        self._models[side] = Model(kind)
        for tensor in range(COUNT):
            self._call[side]("paint_tensor", self._name, tensor, 0)

    def end(self) -> None:
        for side in self._models:
            self._call[side]("drop", self._name)

    def check(self) -> None:
        for side, model in self._models.items():
            assert self._call[side]("users_rows", self._name) == model.rows, side

    def step(self, what: str, *args: Any) -> None:
        getattr(self, f"_{what}")(*args)
        self.check()

    def _transfer(self, operation: str, dst: str, src: str, to: int, at: int) -> None:
        models = self._models
        blocks = ([at], [to])
        failure = self._call["mine"]("attempt", operation, self._key, Ref(self._name), *blocks)
        if models["mine"].moved or models["theirs"].moved:
            assert failure is not None
            assert "has moved" in failure.text
            return
        assert failure is None, failure
        for into, out in zip(models[dst].rows, models[src].rows, strict=True):
            into[to] = out[at]

    def _pull(self, to: int, at: int) -> None:
        self._transfer("pull_blocks", "mine", "theirs", to, at)

    def _push(self, to: int, at: int) -> None:
        self._transfer("push_blocks", "theirs", "mine", to, at)

    def _copy(self, side: str, to: int, at: int) -> None:
        failure = self._call[side]("attempt", "copy_blocks", Ref(self._name), {at: [to]})
        if self._models[side].moved:
            assert failure is not None
            assert "has moved" in failure.text
            return
        assert failure is None, failure
        for rows in self._models[side].rows:
            rows[to] = rows[at]

    def _paint(self, side: str, tensor: int, value: int) -> None:
        self._call[side]("paint_tensor", self._name, tensor, value)
        self._models[side].rows[tensor] = [value] * ROWS

    def _move(self, side: str, tensor: int, how: str) -> None:
        model = self._models[side]
        if how == "resize" and (model.kind == "allocated" or model.moved):
            return  # torch refuses the one, and does not survive the other after share_memory_
        self._call[side]("move_tensor", self._name, how, tensor)
        # Memory of ours is shared as it is.
        model.moved |= not (how == "send" and model.kind == "allocated" and not model.moved)

    def _renew(self, side: str) -> None:
        self._call[side]("drop", self._name)
        self._make(side)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    peer=st.sampled_from(list(IDS)),
    kinds=st.tuples(KINDS, KINDS),
    steps=st.lists(STEPS, min_size=2, max_size=10),
)
def test_any_moves_among_transfers(
    world: World, peer: str, kinds: tuple[str, str], steps: list[tuple[Any, ...]]
) -> None:
    run = Run(world, peer, kinds)
    try:
        for what, *args in steps:
            run.step(what, *args)
    finally:
        run.end()
