# SPDX-License-Identifier: Apache-2.0
"""Caches made and freed, and memory registered."""

from __future__ import annotations

import mmap
from typing import Any

import torch

import llm_datadist_torch as ld
from benchmarks.cases import Plan
from benchmarks.measuring import KIB, TINY, Effort, contender, figures, measure, point
from benchmarks.peers import Call

TENSORS = 80
SIZES = (64 * KIB, KIB**2, 16 * KIB**2)  # of a tensor
REGISTERED, REGISTERED_TENSORS = 64 << 30, 64
MANY = Effort(rounds=101, seconds=1.5)


def alloc(plan: Plan) -> list[dict[str, Any]]:
    """Caches of 80 tensors of each size, then 64 GiB of registered memory."""
    effort = TINY if plan.tiny else MANY
    points = []
    for size in plan.sweep or (SIZES[:1] if plan.tiny else SIZES):
        points.append(allocations(size, effort))
        plan.show(points[-1])
    points.append(registrations(REGISTERED, effort))
    plan.show(points[-1])
    return points


def allocations(size: int, effort: Effort) -> dict[str, Any]:
    """A cache allocated and freed, without a pool and from one, against as much torch.empty."""
    with ld.open() as bare, ld.open(pool_bytes=2 * TENSORS * size) as pooled:

        def allocate(node: ld.Node) -> None:
            cache = node.allocate(
                layers=TENSORS, tensors_per_layer=1, rows=8, shape=(size // 8,), dtype=torch.uint8
            )
            node.free(cache)

        def torch_empty() -> None:
            tensors = [torch.empty(8, size // 8, dtype=torch.uint8) for _ in range(TENSORS)]
            del tensors

        calls: dict[str, Call] = {
            "allocate": lambda: allocate(bare),
            "allocate from a pool": lambda: allocate(pooled),
            "torch.empty": torch_empty,
        }
        taken = measure(calls, effort)
    contenders = [
        contender(
            name,
            "peer" if name == "torch.empty" else "ours",
            figures(taken[name], units=TENSORS),
            () if name == "torch.empty" else ("torch.empty",),
        )
        for name in calls
    ]
    place = {"tensor_bytes": size, "tensors": TENSORS}
    return point(place, contenders, rounds=len(taken["allocate"].seconds))


def registrations(nbytes: int, effort: Effort) -> dict[str, Any]:
    """Memory of a serving process's size, registered and unregistered. No page of it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)
    tensors = list(memory.view(REGISTERED_TENSORS, 1024, -1).unbind(0))
    with ld.open() as node:

        def register() -> None:
            node.free(node.register(tensors, tensors_per_layer=1, name="kv"))

        taken = measure({"register": register}, effort)
    found = figures(taken["register"], units=REGISTERED_TENSORS)
    place = {"tensor_bytes": nbytes // REGISTERED_TENSORS, "tensors": REGISTERED_TENSORS}
    return point(
        place, [contender("register", "ours", found)], rounds=len(taken["register"].seconds)
    )
