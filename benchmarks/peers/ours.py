# SPDX-License-Identifier: Apache-2.0
"""This library: what people call."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

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


class OneTransport(Peer):
    """One transport alone. A point counts only if every byte of it went this way.

    Attributes:
        transport: The transport.
        path: How the library's counters call the way that the bytes must go.
    """

    role = "ours"
    transport: ClassVar[str]
    path: ClassVar[str]

    @contextmanager
    def serve(self, memory: Memory) -> Iterator[Any]:
        listen = f"{memory.host}:0"
        with ld.open(listen=listen, transport=self.transport, timeout_s=TIMEOUT_S) as node:
            node.register(memory.allocated.tensors, tensors_per_layer=1, name=self.name)
            yield node.address

    @contextmanager
    def mover(self, task: Task) -> Iterator[Call]:
        with ld.open(transport=self.transport, timeout_s=TIMEOUT_S) as node:
            cache = node.register(task.memory.allocated.tensors, tensors_per_layer=1)
            move, calls = call_of(node.connect(task.offer), self.name, cache, task), 0

            def call() -> None:
                nonlocal calls
                move()
                calls += 1

            yield call
            moved: dict[str, int] = {}
            for each in node.stats().transfers:
                moved[each.path] = moved.get(each.path, 0) + each.nbytes
            if moved != {self.path: calls * task.shape.nbytes}:
                raise SystemExit(
                    f"bench: {self.name}: {calls} calls for {task.shape.nbytes} bytes each should"
                    f" all go by {self.path!r}, and the counters say {moved}"
                )


class OverNixl(OneTransport):
    """The transport `nixl` alone; UCX chooses the way, on one host shared memory."""

    name = "over nixl"
    transport = path = "nixl"
    baselines = ("raw NIXL",)
    ceiling = "process_vm loop"

    def why_not(self) -> str:
        return why_no_nixl()


class OverNixlTcp(OverNixl):
    """The same between hosts, where UCX takes TCP."""

    name = "over nixl, TCP"
    hosts = (2,)
    baselines = ("raw NIXL", "raw NIXL, merged", "Mooncake TCP", "gloo")
    ceiling = "TCP stream"


class Relay(OneTransport):
    """The control connection, which is there without any engine."""

    name = "relay"
    hosts = (2,)
    transport, path = "local", "relay"
    baselines = ("raw NIXL", "gloo", "Mooncake TCP")
    ceiling = "TCP stream"


def call_of(peer: ld.Peer, key: str, cache: ld.Cache, task: Task) -> Call:
    """The pull or push of a task."""
    move = peer.push if task.push else peer.pull
    return lambda: move(key, cache, task.src_ids, task.dst_ids)


def why_no_nixl() -> str:
    """Why NIXL can't be used; "" where it can."""
    if importlib.util.find_spec("nixl_cu12") is None:
        return 'not installed: pip install "llm_datadist_torch[nixl]"'
    return ""
