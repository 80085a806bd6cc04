# SPDX-License-Identifier: Apache-2.0
"""Pulls and pushes between two processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import Any

import llm_datadist_torch as ld
from benchmarks.cases import Plan
from benchmarks.measuring import KIB, Effort, contender, figures, measure, point
from benchmarks.owner import TIMEOUT_S, Owner, memory_of
from benchmarks.peers import Call, Peer, PeerFailedError, Shape, Task

BYTES = 256 << 20  # of a transfer, at most
SIZES = tuple(KIB << shift for shift in range(2, 13, 2))  # 4 KiB to 4 MiB
RUNS = (1_000, 10_000, 100_000, 1_000_000)
Examine = Callable[[Mapping[str, Call], Shape], dict[str, float]]
LATENCY = Effort(rounds=30, seconds=3.0, in_a_row=20)


def shape_of(block_bytes: int, run: int, *, tiny: bool, most: int = BYTES) -> Shape:
    """64 tensors x 128 blocks, or fewer where they are more than so many bytes."""
    if tiny:
        return Shape(block_bytes, run, tensors=2, blocks=max(4, run))
    blocks = min(128, most // block_bytes)
    return Shape(block_bytes, run, min(64, max(1, most // (blocks * block_bytes))), blocks)


def pull(plan: Plan) -> list[dict[str, Any]]:
    """One 4 KiB block, then many of each size; scattered, and in runs of 16."""
    sizes = plan.sweep or SIZES
    shapes = [Shape(4 * KIB, 1, 1, 1)]
    shapes += [shape_of(size, 1, tiny=plan.tiny) for size in sizes]
    shapes += [shape_of(size, 16, tiny=plan.tiny) for size in sizes if size <= 64 * KIB]
    return sweep(plan, shapes, push=False)


def push(plan: Plan) -> list[dict[str, Any]]:
    """One 4 KiB block, then many of each second size, scattered."""
    sizes = plan.sweep or SIZES[::2]
    shapes = [shape_of(size, 1, tiny=plan.tiny) for size in sizes]
    return sweep(plan, [Shape(4 * KIB, 1, 1, 1), *shapes], push=True)


def runs(plan: Plan) -> list[dict[str, Any]]:
    """Scattered blocks of 64 bytes of one tensor: what a run costs, however many there are."""
    shapes = [Shape(64, 1, 1, count) for count in plan.sweep or RUNS]
    kept = [peer for peer in plan.peers if peer.role != "peer" and peer.name != "over nixl"]
    return sweep(replace(plan, peers=kept), shapes, push=False)


def sweep(plan: Plan, shapes: Sequence[Shape], *, push: bool) -> list[dict[str, Any]]:
    """All shapes, with one owner."""
    points = []
    peers = [peer for peer in plan.peers if 1 in peer.hosts]
    with closing(Owner()) as owner, ld.open(timeout_s=TIMEOUT_S) as node:
        for shape in shapes:
            effort = effort_of(plan, shape)
            points.append(transfer(peers, owner, node, shape, effort, push=push))
            plan.show(points[-1])
    return points


def effort_of(plan: Plan, shape: Shape) -> Effort:
    """One block alone is the latency, for which each contender has more calls in a row."""
    single = shape.tensors * shape.blocks == 1 and not plan.tiny
    return LATENCY if single else plan.effort


def transfer(
    peers: Sequence[Peer],
    owner: Owner,
    node: ld.Node,
    shape: Shape,
    effort: Effort,
    *,
    push: bool,
    examine: Examine | None = None,
) -> dict[str, Any]:
    """One point: all contenders in turn, after the bytes of each were compared.

    Args:
        peers: Who moves them.
        owner: The other side.
        node: Whose memory this side's is.
        shape: What is moved.
        effort: How long to measure.
        push: Whether bytes go to the owner.
        examine: Looks at the calls when all have been measured; what it finds is shown, too.
    """
    src_ids, dst_ids = shape.ids(1), shape.ids(2)
    with (
        owner.serving(shape, [peer.name for peer in peers]) as offers,
        memory_of(node, shape, owner=False) as memory,
        ExitStack() as stack,
    ):
        if push:
            for tensor in memory.allocated.tensors:
                tensor.random_()
        calls: dict[str, Call] = {}
        for peer in peers:
            task = Task(memory, offers[peer.name], push, src_ids, dst_ids)
            call = stack.enter_context(peer.mover(task))
            with suppress(PeerFailedError):
                check(peer, call, task, owner)
                calls[peer.name] = call
        taken = measure(calls, effort, [owner.pid])
        good = {name: calls[name] for name in taken}
        found = {} if examine is None else {"further": examine(good, shape)}
    contenders = [
        contender(
            peer.name,
            peer.role,
            figures(taken[peer.name], shape.nbytes, shape.tensors * shape.blocks),
            peer.baselines,
            peer.ceiling,
        )
        for peer in peers
        if peer.name in taken
    ]
    place = {"block_bytes": shape.block_bytes, "run": shape.run}
    place |= {"tensors": shape.tensors, "blocks": shape.blocks}
    rounds = len(next(iter(taken.values())).seconds)
    failed = [peer.name for peer in peers if peer.name not in taken]
    return point(place, contenders, bytes=shape.nbytes, rounds=rounds, failed=failed, **found)


def check(peer: Peer, call: Call, task: Task, owner: Owner) -> None:
    """Compare a sample of the bytes that a call has moved with those that it should have moved."""
    if not peer.moves_blocks:
        call()
        return
    if task.push:
        owner.zero(peer.memory)
        call()
        there = owner.digest(peer.memory, task.dst_ids)
        right = there == task.memory.digest("allocated", task.src_ids)
    else:
        task.memory.zero("allocated")
        call()
        here = task.memory.digest("allocated", task.dst_ids)
        right = here == owner.digest(peer.memory, task.src_ids)
    if not right:
        raise SystemExit(f"bench: {peer.name} does not move the right bytes")
