# SPDX-License-Identifier: Apache-2.0
"""NIXL without this library, as its documents advise for KV caches.

Memory is registered once, descriptor lists of all blocks are prepared once; each transfer is one
READ or WRITE made of block indices in arrays, posted, and polled without a nap. It asks nobody,
checks nothing, holds no lease and can't be stopped. UCX chooses the way, unless UCX_TLS is set.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.peers import Call, Memory, Peer, Shape, Task
from benchmarks.peers.mooncake import merged
from benchmarks.peers.ours import why_no_nixl

WAKE_US = 20_000


class Agent:
    """One agent of NIXL; the settings of this library's, so that its threads don't spin."""

    def __init__(self, memory: Memory) -> None:
        import nixl_cu12._bindings as nixl

        self.nixl = nixl
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.useListenThread = True, False
        config.pthrDelay = WAKE_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        self.name = uuid.uuid4().hex
        self.agent = nixl.nixlAgent(self.name, config)
        self.ucx = [self.agent.createBackend("UCX", {})]
        rows = [[t.data_ptr(), t.nbytes, 0] for t in memory.allocated.tensors]
        self.memory = nixl.nixlRegDList(nixl.DRAM_SEG, torch.tensor(rows).numpy().view("uint64"))
        self.agent.registerMem(self.memory, self.ucx)

    def close(self) -> None:
        """Deregister the memory, and end."""
        self.agent.deregisterMem(self.memory, self.ucx)
        del self.agent

    def prepare(self, shape: Shape, addresses: list[int], name: str | None = None) -> int:
        """Prepare a list of all blocks of tensors, of ours or of a peer's."""
        starts = torch.tensor(addresses)[:, None] + torch.arange(shape.pool) * shape.block_bytes
        args = (self.descriptors(starts, torch.tensor(shape.block_bytes)), self.ucx)
        return int(self.agent.prepXferDlist(*args if name is None else (name, *args)))

    def descriptors(self, starts: torch.Tensor, nbytes: torch.Tensor) -> Any:  # noqa: ANN401
        """A list of what is at those addresses, int64 [tensors, n], of so many bytes each."""
        flat = starts.flatten()
        columns = (flat, nbytes.expand_as(starts).flatten(), torch.zeros_like(flat))
        table = torch.stack(columns, dim=1).numpy().view("uint64")
        return self.nixl.nixlXferDList(self.nixl.DRAM_SEG, table)

    def move(self, way: Any, mine: int, my_ids: Any, theirs: int, their_ids: Any) -> None:  # noqa: ANN401
        """Move blocks by index; polls until they are there."""
        self.finish(self.agent.makeXferReq(way, mine, my_ids, theirs, their_ids, "", self.ucx))

    def finish(self, handle: int) -> None:
        """Post a request; polls until its bytes are there."""
        status = self.agent.postXferReq(handle, "")
        while status == self.nixl.NIXL_IN_PROG:
            status = self.agent.getXferStatus(handle)
        self.agent.releaseXferReq(handle)


class RawNixl(Peer):
    """A loop on NIXL itself, with prepared lists."""

    name = "raw NIXL"
    option = "nixl"
    hosts = (1, 2)

    def why_not(self) -> str:
        return why_no_nixl()

    @contextmanager
    def serve(self, memory: Memory) -> Iterator[Any]:
        agent = Agent(memory)
        yield agent.name, agent.agent.getLocalMD(), list(memory.allocated.tensor_addrs)
        agent.close()

    @contextmanager
    def mover(self, task: Task) -> Iterator[Call]:
        name, metadata, addresses = task.offer
        agent, shape = Agent(task.memory), task.shape
        agent.agent.loadRemoteMD(metadata)
        mine = agent.prepare(shape, list(task.memory.allocated.tensor_addrs))
        theirs = agent.prepare(shape, addresses, name)
        way = agent.nixl.NIXL_WRITE if task.push else agent.nixl.NIXL_READ
        indices = (_indices(shape, task.my_ids), _indices(shape, task.owner_ids))
        yield lambda: agent.move(way, mine, indices[0], theirs, indices[1])
        agent.close()


class MergedNixl(RawNixl):
    """The same with a descriptor for each run of neighbours, as its users merge them.

    The lists are made beforehand for the blocks that move, and taken whole.
    """

    name = "raw NIXL, merged"
    hosts = (2,)

    @contextmanager
    def mover(self, task: Task) -> Iterator[Call]:
        name, metadata, theirs = task.offer
        agent, nbytes = Agent(task.memory), task.shape.block_bytes
        agent.agent.loadRemoteMD(metadata)
        runs = torch.tensor(merged(task.my_ids, task.owner_ids)) * nbytes
        lists = [
            agent.descriptors(torch.tensor(bases)[:, None] + runs[:, column], runs[:, 2])
            for bases, column in ((list(task.memory.allocated.tensor_addrs), 0), (theirs, 1))
        ]
        way = agent.nixl.NIXL_WRITE if task.push else agent.nixl.NIXL_READ

        def call() -> None:
            agent.finish(agent.agent.createXferReq(way, *lists, name, "", agent.ucx))

        yield call
        agent.close()


def _indices(shape: Shape, ids: torch.Tensor) -> Any:  # noqa: ANN401
    """Indices into a list of all blocks of all tensors."""
    tensors = torch.arange(shape.tensors)[:, None] * shape.pool
    return (tensors + ids).flatten().to(torch.int32).numpy()
