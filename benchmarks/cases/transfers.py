# SPDX-License-Identifier: Apache-2.0
"""Pulls and pushes between two processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import Any

import llm_datadist_torch as ld
from benchmarks.cases import Plan
from benchmarks.measuring import KIB, TINY, Effort, contender, figures, measure, point
from benchmarks.owner import TIMEOUT_S, Owner, memory_of
from benchmarks.peers import Call, Peer, PeerFailedError, Shape, Task

BYTES = 256 << 20  # of a transfer, at most
SIZES = tuple(KIB << shift for shift in range(2, 13, 2))  # 4 KiB to 4 MiB
RUNS = (1_000, 10_000, 100_000, 1_000_000)
LATENCY = Effort(rounds=30, seconds=3.0, in_a_row=20)


def shape_of(block_bytes: int, run: int, *, tiny: bool) -> Shape:
    """64 tensors x 128 blocks, or fewer where they are more than BYTES."""
    if tiny:
        return Shape(block_bytes, run, tensors=2, blocks=max(4, run))
    blocks = min(128, BYTES // block_bytes)
    return Shape(block_bytes, run, min(64, max(1, BYTES // (blocks * block_bytes))), blocks)


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
    with closing(Owner()) as owner, ld.open(timeout_s=TIMEOUT_S) as node:
        for shape in shapes:
            single = shape.tensors * shape.blocks == 1 and plan.effort is not TINY
            effort = LATENCY if single else plan.effort
            points.append(transfer(plan.peers, owner, node, shape, effort, push=push))
            plan.show(points[-1])
    return points


def transfer(
    peers: Sequence[Peer], owner: Owner, node: ld.Node, shape: Shape, effort: Effort, *, push: bool
) -> dict[str, Any]:
    """One point: all contenders in turn, after the bytes of each were compared."""
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
    return point(place, contenders, bytes=shape.nbytes, rounds=rounds, failed=failed)


def check(peer: Peer, call: Call, task: Task, owner: Owner) -> None:
    """Compare a sample of the bytes that a call has moved with those that it should have moved."""
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
