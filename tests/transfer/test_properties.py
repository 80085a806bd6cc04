# SPDX-License-Identifier: Apache-2.0
"""Any transfer, by any way, in either direction, against the slow model: all bytes of both sides
are compared, canaries included.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from llm_datadist_torch import BlocksCacheKey, CacheKeyByIdAndIndex
from llm_datadist_torch.transports.choice import LinkChannel
from tests import reference
from tests.devices import examples, on_npu
from tests.peers import NearPeer, Peer, Ref, Service, eventually, spawn

IDS = {"far": 2, "near": 3, "relayed": 4, "engine": 5}
KINDS = ("allocated", "tensors", "ints")
WAYS = {
    ("far", "allocated"): "shared-mapping",
    ("far", "tensors"): "process-memory",
    ("far", "ints"): "process-memory",
    **{("near", kind): "same-process" for kind in KINDS},
    **{("relayed", kind): "relay" for kind in KINDS},
    **{("engine", kind): "hixl" for kind in KINDS},
}
PEERS = ["far", "near", "relayed"]
OPTIONS = {"engine": {"options": {"llm.Transport": "hixl"}}}
if on_npu():
    WAYS |= {("far", kind): "device-ipc" for kind in KINDS}
    PEERS = ["far", "near", "engine"]


def ways_of(peer: str, kind: str) -> set[str]:
    """The paths that may be taken to a peer's memory."""
    way = WAYS[peer, kind]
    # Until HIXL has reconnected, what was registered meanwhile goes by the control connection.
    return {way, "relay"} if way == "hixl" else {way}


@dataclass
class World:
    """This process's instance (1) and its peers, all linked; and the paths that were taken here."""

    here: Service
    peers: dict[str, Peer | NearPeer]
    ids: dict[str, int]
    taken: list[str]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    here = Service()
    port = here.start(1)
    peers = {name: NearPeer() if name == "near" else spawn() for name in PEERS}
    for name, peer in peers.items():
        peer.call("start", IDS[name], **OPTIONS.get(name, {}))
        assert peer.call("link", 1, port)[0] == "LLM_SUCCESS"
    if "relayed" in PEERS:
        here.only_relay(IDS["relayed"])
        peers["relayed"].call("only_relay", 1)
    taken: list[str] = []
    move = LinkChannel.move

    def recorded(self: LinkChannel, movement: Any, deadline: Any) -> str:
        taken.append(move(self, movement, deadline))
        return taken[-1]

    LinkChannel.move = recorded  # type: ignore[method-assign]
    yield World(here, peers, IDS, taken)
    LinkChannel.move = move  # type: ignore[method-assign]
    for peer in peers.values():
        peer.close()
    here.finish()


@dataclass
class Case:
    """One transfer: how the two caches look, and the call."""

    operation: str
    peer: str
    mover_here: bool
    kinds: tuple[str, str]
    counts: tuple[int, int]
    rows: tuple[int, int]
    row_bytes: tuple[int, int]
    slack: tuple[int, int]
    per_layer: int
    layers: tuple[range | None, range | None]
    row: tuple[int, int]
    size: int
    ids: tuple[list[int], list[int]]


def _range(draw: Any, layers: int, length: int | None) -> range | None:
    if length is None:
        return None
    start = draw(st.integers(0, max(0, layers - length)))
    return range(start, start + length)


@st.composite
def cases(draw: Any) -> Case:
    """Mostly right ones, with everything (local, remote) in this order."""
    sloppy = draw(st.integers(0, 9)) == 0
    operation = draw(
        st.sampled_from(["pull_cache", "pull_blocks", "cut", "push_cache", "push_blocks"])
    )
    per_layer = draw(st.integers(1, 3))
    layers = [draw(st.integers(1, 3)) for _ in range(2)]
    length = draw(st.none() | st.integers(1, min(layers)))
    if length is None and not sloppy:
        layers[1] = layers[0]
    sizes = [draw(st.integers(1, 70)) for _ in range(2)]
    if operation.endswith("blocks") and not sloppy:
        sizes[1] = sizes[0]
    if operation == "cut" and not sloppy:
        sizes.sort()
    # A push needs room at the peer.
    if operation == "push_cache" and not sloppy:
        sizes.sort()
    rows = [draw(st.integers(1, 9)) for _ in range(2)]
    beyond = 1 if sloppy else 0
    most = rows[0] if operation != "cut" else min(rows[0], -(-sizes[1] // sizes[0]))
    number = draw(st.integers(1, max(1, min(most, rows[1] if "push" in operation else most))))
    unique = draw(st.permutations(range(rows[1 if "push" in operation else 0] + beyond)))[:number]
    others = draw(
        st.lists(
            st.integers(0, rows[0 if "push" in operation else 1] - 1 + beyond),
            min_size=len(unique),
            max_size=len(unique),
        )
    )
    ids = (others, unique) if "push" in operation else (unique, others)
    kinds = [draw(st.sampled_from(["allocated", "tensors", "ints"])) for _ in range(2)]
    return Case(
        operation,
        draw(st.sampled_from(PEERS)),
        draw(st.booleans()),
        (kinds[0], kinds[1]),
        (layers[0] * per_layer, layers[1] * per_layer + (1 if sloppy else 0)),
        (rows[0], rows[1]),
        (sizes[0], sizes[1]),
        (draw(st.sampled_from([0, 0, 5, 64])), draw(st.sampled_from([0, 0, 5, 64]))),
        per_layer,
        (_range(draw, layers[0], length), _range(draw, layers[1], length)),
        (
            draw(st.integers(0, rows[0] - 1 + beyond)),
            draw(st.integers(0, rows[1] - 1 + beyond)),
        ),
        draw(st.just(-1) | st.integers(1, min(sizes) + beyond)),
        ids,
    )


_names = itertools.count(1)


def build(service: Any, case: Case, side: int, paged: bool, key: Any) -> tuple[str, reference.Rows]:
    """A cache full of random bytes, and its model."""
    name = f"c{next(_names)}"
    size = case.row_bytes[side]
    service(
        "make",
        case.kinds[side],
        name,
        case.counts[side],
        case.rows[side],
        size,
        paged=paged,
        row_stride_bytes=size + case.slack[side],
        keys=key,
    )
    memory = bytearray(service("fill", name, next(_names)))
    starts, rows, row_bytes, row_stride_bytes = service("span", name)
    return name, reference.Rows(memory, starts, rows, row_bytes, row_stride_bytes)


def expect(case: Case, local: reference.Rows, remote: reference.Rows) -> bool:
    """Do it in the model; False if it must be refused."""
    arguments = (*case.layers, case.per_layer)
    before = copy.deepcopy((local.memory, remote.memory))
    try:
        if case.operation.startswith("push"):
            pairs = reference.pushed(remote, local, *reversed(case.layers), case.per_layer)
        else:
            pairs = reference.pulled(local, remote, *arguments)
        size = local.row_bytes if case.size == -1 else case.size
        if case.operation == "pull_cache":
            reference.move_row(local, remote, pairs, *case.row, size)
        elif case.operation == "pull_blocks":
            reference.move_blocks(local, remote, pairs, *case.ids)
        elif case.operation == "cut":
            reference.cut_row(local, remote, pairs, case.ids[0], case.row[1])
        elif case.operation == "push_cache":
            reference.move_row(remote, local, pairs, case.row[1], case.row[0], local.row_bytes)
        else:
            reference.move_blocks(remote, local, pairs, case.ids[1], case.ids[0])
    except reference.NotAllowedError:
        local.memory, remote.memory = before
        return False
    return True


def call(mover: Any, case: Case, name: str, owner: int, cache_id: int, model: int) -> Any:
    local, remote = case.layers
    layers = {
        "src_layer_range": local if case.operation.startswith("push") else remote,
        "dst_layer_range": remote if case.operation.startswith("push") else local,
        "tensor_num_per_layer": case.per_layer,
    }
    row = CacheKeyByIdAndIndex(owner, cache_id, case.row[1])
    blocks = BlocksCacheKey(owner, model)
    cache = Ref(name)
    if case.operation == "pull_cache":
        return mover("attempt", "pull_cache", row, cache, case.row[0], case.size, **layers)
    if case.operation == "cut":
        return mover("attempt", "pull_blocks", row, cache, [], case.ids[0], **layers)
    if case.operation == "pull_blocks":
        return mover("attempt", "pull_blocks", blocks, cache, case.ids[1], case.ids[0], **layers)
    if case.operation == "push_cache":
        return mover("attempt", "push_cache", row, cache, case.row[0], **layers)
    return mover("attempt", "push_blocks", blocks, cache, case.ids[0], case.ids[1], **layers)


@settings(
    max_examples=examples(500),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=cases())
def test_any_transfer(world: World, case: Case) -> None:
    def here(name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(world.here, name)(*args, **kwargs)

    there = world.peers[case.peer].call
    mover, owner = (here, there) if case.mover_here else (there, here)
    owner_id = world.ids[case.peer] if case.mover_here else 1
    paged = (case.operation != "pull_cache" and case.operation != "push_cache",
             case.operation.endswith("blocks"))  # fmt: skip
    model = next(_names)
    key = BlocksCacheKey(0, model) if paged[1] else None
    name, local = build(mover, case, 0, paged[0], None)
    remote_name, remote = build(owner, case, 1, paged[1], key)
    try:
        allowed = expect(case, local, remote)
        world.taken.clear()
        failure = call(mover, case, name, owner_id, owner("cache_id", remote_name), model)
        if allowed:
            assert failure is None
            if case.mover_here:
                (taken,) = world.taken
                assert taken in ways_of(case.peer, case.kinds[1])
            event(f"{case.operation} {case.peer} moved")
        else:
            assert failure is not None
            assert failure.status in ("LLM_PARAM_INVALID", "LLM_KV_CACHE_NOT_EXIST")
            event("refused")
        assert mover("dump", name) == local.memory
        assert owner("dump", remote_name) == remote.memory
    finally:
        mover("drop", name)
        owner("drop", remote_name)


def test_nothing_is_left(world: World) -> None:
    for service in (world.here, world.peers["near"].service):  # type: ignore[union-attr]
        # The last lease may be on its way back.
        assert eventually(lambda s=service: s.counters()["caches"] == 0)
        assert service.counters()["leases"] == 0
    for name in set(PEERS) - {"near"}:
        assert world.peers[name].call("counters") == {
            "caches": 0,
            "keys": 0,
            "leases": 0,
            "grants": 0,
        }
