# SPDX-License-Identifier: Apache-2.0
"""This library: what people call."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llm_datadist_torch as ld
from benchmarks.peers import Call, Memory, Peer, Task

TIMEOUT_S = 60.0


class Allocated(Peer):
    """Caches that the library allocated at both sides."""

    name = "allocated"
    role = "ours"
    baselines = ("raw NIXL", "gloo", "Mooncake TCP")
    ceiling = "C loop over a mapping"

    @contextmanager
    def serve(self, memory: Memory) -> Iterator[Any]:
        yield memory.node.address

    @contextmanager
    def mover(self, task: Task) -> Iterator[Call]:
        yield call_of(
            task.memory.node.connect(task.offer), self.memory, task.memory.allocated, task
        )


class Registered(Allocated):
    """The owner's cache is of tensors that torch allocated."""

    name = "registered"
    memory = "registered"
    ceiling = "process_vm loop"


class OverNixl(Peer):
    """The transport `nixl` alone, as between hosts."""

    name = "over nixl"
    role = "ours"
    baselines = ("raw NIXL",)
    ceiling = "process_vm loop"

    def why_not(self) -> str:
        return why_no_nixl()

    @contextmanager
    def serve(self, memory: Memory) -> Iterator[Any]:
        with ld.open(listen="127.0.0.1:0", transport="nixl", timeout_s=TIMEOUT_S) as node:
            node.register(memory.allocated.tensors, tensors_per_layer=1, name="nixl")
            yield node.address

    @contextmanager
    def mover(self, task: Task) -> Iterator[Call]:
        with ld.open(transport="nixl", timeout_s=TIMEOUT_S) as node:
            cache = node.register(task.memory.allocated.tensors, tensors_per_layer=1)
            call = call_of(node.connect(task.offer), "nixl", cache, task)
            call()
            (link,) = node.stats().links
            if set(link.transports.values()) - {""} != {"nixl"}:
                raise SystemExit(f"bench: not all bytes go over NIXL: {link.transports}")
            yield call


def call_of(peer: ld.Peer, key: str, cache: ld.Cache, task: Task) -> Call:
    """The pull or push of a task."""
    move = peer.push if task.push else peer.pull
    return lambda: move(key, cache, task.src_ids, task.dst_ids)


def why_no_nixl() -> str:
    """Why NIXL can't be used; "" where it can."""
    if importlib.util.find_spec("nixl_cu12") is None:
        return 'not installed: pip install "llm_datadist_torch[nixl]"'
    return ""
