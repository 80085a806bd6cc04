# SPDX-License-Identifier: Apache-2.0
"""What moves blocks from process to process: this library, its peers, and the machine's ceilings.

All of them are behind one interface, :class:`Peer`, and move the same blocks of the same memory.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import llm_datadist_torch as ld

Call = Callable[[], object]
LOCALHOST = "127.0.0.1"


class PeerFailedError(Exception):
    """A peer can't do what it was asked for; it is left out of that point."""


@dataclass(frozen=True)
class Shape:
    """One point of a sweep: what one transfer moves.

    Attributes:
        block_bytes: Bytes of a block.
        run: Adjacent blocks in each run; 1 is fully scattered.
        tensors: Tensors of each cache.
        blocks: Blocks moved of each tensor, a multiple of ``run``; a cache has twice as many.
    """

    block_bytes: int
    run: int = 1
    tensors: int = 64
    blocks: int = 128

    @property
    def pool(self) -> int:
        """Blocks of each tensor."""
        return 2 * self.blocks

    @property
    def nbytes(self) -> int:
        """Bytes that one transfer moves."""
        return self.tensors * self.blocks * self.block_bytes

    def ids(self, seed: int) -> torch.Tensor:
        """Shuffled ids of the blocks to move, in runs; int64 [blocks]."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randperm(self.pool // self.run, generator=generator)
        starts = starts[: self.blocks // self.run] * self.run
        return (starts[:, None] + torch.arange(self.run)).flatten()


@dataclass(frozen=True)
class Memory:
    """The memory of one side: equal tensors, uint8 [pool, block_bytes] each.

    Attributes:
        node: The instance of this library that both caches belong to.
        shape: What is moved.
        allocated: A cache that the library allocated.
        registered: One of torch's own tensors; the same bytes. Of the owner only.
        host: The address of this side's host, where its peers listen.
    """

    node: ld.Node
    shape: Shape
    allocated: ld.Cache
    registered: ld.Cache | None = None
    host: str = LOCALHOST

    def cache(self, kind: str) -> ld.Cache:
        """The cache of a kind, "allocated" or "registered"."""
        found = self.allocated if kind == "allocated" else self.registered
        assert found is not None
        return found

    def digest(self, kind: str, ids: torch.Tensor) -> int:
        """A checksum of 16 columns of the blocks ``ids``, in this order, of all tensors."""
        columns = torch.linspace(0, self.shape.block_bytes - 1, 16).long()
        total = 0
        for tensor in self.cache(kind).tensors:
            total = zlib.crc32(tensor.index_select(1, columns)[ids].numpy().tobytes(), total)
        return total

    def zero(self, kind: str) -> None:
        """Overwrite a cache with zeroes."""
        for tensor in self.cache(kind).tensors:
            tensor.zero_()


@dataclass(frozen=True)
class Task:
    """What the side that acts has to do, again and again.

    Attributes:
        memory: Its own memory; ``memory.allocated`` is read or written.
        offer: What the owner's :meth:`Peer.serve` has yielded.
        push: Whether bytes go to the owner; they come from it otherwise.
        src_ids: Blocks where the bytes come from, int64 [blocks].
        dst_ids: Blocks where they go to.
    """

    memory: Memory
    offer: Any
    push: bool
    src_ids: torch.Tensor
    dst_ids: torch.Tensor

    @property
    def shape(self) -> Shape:
        """What is moved."""
        return self.memory.shape

    @property
    def my_ids(self) -> torch.Tensor:
        """Blocks of this side."""
        return self.src_ids if self.push else self.dst_ids

    @property
    def owner_ids(self) -> torch.Tensor:
        """Blocks of the owner."""
        return self.dst_ids if self.push else self.src_ids


class Peer(ABC):
    """One way to move blocks between two processes. Its objects are made in both of them.

    Attributes:
        name: What the figures are called.
        option: How ``--against`` names it; "" for the library itself.
        role: "ours", "peer" or "ceiling".
        memory: Which of the owner's caches it moves, "allocated" or "registered".
        hosts: Between processes of how many hosts it is measured, 1 and 2.
        moves_blocks: False for a ceiling that moves as many bytes, but not into blocks.
        baselines: Names of the peers that it is compared with.
        ceiling: Name of its ceiling, "" for none.
    """

    name: ClassVar[str]
    option: ClassVar[str] = ""
    role: ClassVar[str] = "peer"
    memory: ClassVar[str] = "allocated"
    hosts: ClassVar[tuple[int, ...]] = (1,)
    moves_blocks: ClassVar[bool] = True
    baselines: ClassVar[tuple[str, ...]] = ()
    ceiling: ClassVar[str] = ""

    def why_not(self) -> str:
        """Why it can't be used here, with the remedy; "" where it can."""
        return ""

    @contextmanager
    def serve(self, memory: Memory) -> Iterator[Any]:  # noqa: ARG002 (of those that need it)
        """At the owner: be ready for movers; yields what they must know, which can be pickled."""
        yield None

    @abstractmethod
    @contextmanager
    def mover(self, task: Task) -> Iterator[Call]:
        """At the other side: yields a call that returns when all blocks are there."""
        raise NotImplementedError


def all_peers() -> list[Peer]:
    """One of each, the library itself first. Nothing foreign is imported yet."""
    from benchmarks.peers import gloo, loops, mooncake, nixl, ours, stream

    return [
        ours.Allocated(),
        ours.Registered(),
        ours.OverNixl(),
        ours.OverNixlTcp(),
        ours.Relay(),
        loops.MappingLoop(),
        loops.ProcessMemoryLoop(),
        stream.Stream(),
        nixl.RawNixl(),
        nixl.MergedNixl(),
        gloo.Gloo(),
        mooncake.Mooncake(),
    ]
