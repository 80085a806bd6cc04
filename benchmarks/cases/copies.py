# SPDX-License-Identifier: Apache-2.0
"""copy_blocks and swap_blocks within one process, against torch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import llm_datadist_torch as ld
from benchmarks.cases import Plan
from benchmarks.cases.transfers import SIZES, shape_of
from benchmarks.measuring import contender, figures, measure, point
from benchmarks.peers import Call, Shape
from benchmarks.peers.loops import loop, quickest, why_no_compiler
from llm_datadist_torch import ops

LOOP, INDEX, C_LOOP = "torch, block by block", "torch, index ops", "C loop"


def copy(plan: Plan) -> list[dict[str, Any]]:
    """copy_blocks: from half of a cache into its other half."""
    return sweep(plan, "copy_blocks", lambda dst, _, to, of: ops.copy_blocks(dst, of, to))


def swap(plan: Plan) -> list[dict[str, Any]]:
    """swap_blocks: from a cache into another."""
    return sweep(plan, "swap_blocks", lambda dst, src, to, of: ops.swap_blocks(dst, src, to, of))


Operation = Callable[[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor], object]


def sweep(plan: Plan, name: str, operation: Operation) -> list[dict[str, Any]]:
    """All sizes of blocks, scattered."""
    points = []
    asked = {peer.option for peer in plan.peers}
    for size in plan.sweep or SIZES:
        shape = shape_of(size, 1, tiny=plan.tiny)
        points.append(measure_one(plan, shape, name, operation, ceilings="mapping" in asked))
        plan.show(points[-1])
    return points


def measure_one(
    plan: Plan, shape: Shape, name: str, operation: Operation, *, ceilings: bool
) -> dict[str, Any]:
    """One size: the operation, torch's two ways, and a C loop."""
    with ld.open() as node:
        caches = [
            node.allocate(
                layers=shape.tensors,
                tensors_per_layer=1,
                blocks=shape.pool,
                shape=(shape.block_bytes // 4,),
                dtype=torch.float32,  # torch's index ops are slower on bytes
            )
            for _ in range(1 + (name == "swap_blocks"))
        ]
        for cache in caches:
            for tensor in cache.tensors:
                tensor.uniform_()
        dst, src = list(caches[0].tensors), list(caches[-1].tensors)
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(shape.pool, generator=generator)
        to, of = order[: shape.blocks], order[shape.blocks :]
        calls: dict[str, Call] = {name: lambda: operation(dst, src, to, of)}
        calls |= torchs_ways(dst, src, to, of)
        ceiling = ""
        if ceilings and not why_no_compiler():
            ceiling = C_LOOP
            addresses = [cache.tensor_addrs for cache in caches]
            calls[C_LOOP] = loop(addresses[0], addresses[-1], to, of, shape.block_bytes)
        taken = measure(calls, plan.effort)
    roles = {name: "ours", C_LOOP: "ceiling"}
    contenders = [
        contender(
            each,
            roles.get(each, "peer"),
            figures(taken[each], shape.nbytes, shape.tensors * shape.blocks),
            (INDEX, LOOP) if each == name else (),
            ceiling if each == name else "",
        )
        for each in calls
    ]
    place = {"block_bytes": shape.block_bytes, "tensors": shape.tensors, "blocks": shape.blocks}
    return point(place, contenders, bytes=shape.nbytes, rounds=len(taken[name].seconds))


def torchs_ways(
    dst: list[torch.Tensor], src: list[torch.Tensor], to: torch.Tensor, of: torch.Tensor
) -> dict[str, Call]:
    """What a program without this library does."""
    pairs = list(zip(to.tolist(), of.tolist(), strict=True))
    threads = torch.get_num_threads()

    def block_by_block() -> None:
        for d, s in zip(dst, src, strict=True):
            for i, j in pairs:
                d[i].copy_(s[j])

    def index_ops(count: int) -> None:
        torch.set_num_threads(count)
        for d, s in zip(dst, src, strict=True):
            d.index_copy_(0, to, s.index_select(0, of))
        torch.set_num_threads(threads)

    counts = sorted({1, threads})
    return {LOOP: block_by_block, INDEX: quickest([lambda n=n: index_ops(n) for n in counts])}  # type: ignore[misc]
