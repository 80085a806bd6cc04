# SPDX-License-Identifier: Apache-2.0
"""gloo's send and recv, gathered at one end and scattered at the other.

The blocks of some tensors are gathered into a buffer by index_select, which is sent while the next
are gathered; the other end has posted all its receives and scatters by index_copy_. The blocks are
known to both ends beforehand.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from benchmarks.peers import Call, Memory, Peer, Task

MESSAGE_BYTES = 16 << 20  # at least, where there is as much
TIMEOUT = timedelta(seconds=60)
GO, DATA = 1, 2  # tags
PULL, PUSH, STOP = 1, 2, 3


def why_no_gloo() -> str:
    """Why torch has no gloo; "" where it has."""
    import torch.distributed as dist

    return "" if dist.is_available() and dist.is_gloo_available() else "torch has no gloo"


class End:
    """One end of the process group, with its buffers."""

    def __init__(self, rank: int, store: Any, memory: Memory) -> None:  # noqa: ANN401
        import torch.distributed as dist

        options = dist.ProcessGroupGloo._Options()  # noqa: SLF001
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=memory.host)]  # noqa: SLF001
        options._timeout = TIMEOUT  # noqa: SLF001
        self.group = dist.ProcessGroupGloo(store, rank, 2, options)
        self.other = 1 - rank
        shape = memory.shape
        per_tensor = shape.blocks * shape.block_bytes
        count = max(1, min(shape.tensors, MESSAGE_BYTES // per_tensor))
        # Words: torch's index ops are slower on bytes.
        tensors = [t.view(torch.int64) for t in memory.allocated.tensors]
        self.parts = [tensors[at : at + count] for at in range(0, len(tensors), count)]
        self.buffers = [
            torch.zeros(len(part), shape.blocks, part[0].shape[1], dtype=torch.int64)
            for part in self.parts
        ]

    def send(self, ids: torch.Tensor) -> None:
        """Send the blocks of all tensors."""
        works = []
        for tensors, buffer in zip(self.parts, self.buffers, strict=True):
            for tensor, out in zip(tensors, buffer, strict=True):
                torch.index_select(tensor, 0, ids, out=out)
            works.append(self.group.send([buffer], self.other, DATA))
        for work in works:
            work.wait()

    def receive(self, ids: torch.Tensor) -> None:
        """Receive the blocks of all tensors."""
        works = [self.group.recv([buffer], self.other, DATA) for buffer in self.buffers]
        for tensors, buffer, work in zip(self.parts, self.buffers, works, strict=True):
            work.wait()
            for tensor, blocks in zip(tensors, buffer, strict=True):
                tensor.index_copy_(0, ids, blocks)

    def go(self, what: int) -> None:
        """Tell the other end what comes."""
        self.group.send([torch.tensor([what])], self.other, GO).wait()

    def next(self) -> int:
        """What the other end says that comes."""
        word = torch.zeros(1, dtype=torch.int64)
        self.group.recv([word], self.other, GO).wait()
        return int(word)


class Gloo(Peer):
    """torch.distributed's gloo."""

    name = "gloo"
    option = "gloo"
    hosts = (1, 2)

    def why_not(self) -> str:
        return why_no_gloo()

    @contextmanager
    def serve(self, memory: Memory) -> Iterator[Any]:
        import torch.distributed as dist

        # The store of the movers is made by the owner, whose thread waits for them.
        store = dist.TCPStore(memory.host, 0, 2, is_master=True, wait_for_workers=False)
        ids = memory.shape.ids(1), memory.shape.ids(2)

        def work() -> None:
            end = End(0, dist.PrefixStore(str(os.getpid()), store), memory)
            while (what := end.next()) != STOP:
                if what == PULL:
                    end.send(ids[0])
                else:
                    end.receive(ids[1])
                    end.go(PUSH)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield memory.host, store.port, str(os.getpid())
        thread.join(10)

    @contextmanager
    def mover(self, task: Task) -> Iterator[Call]:
        import torch.distributed as dist

        host, port, prefix = task.offer
        store = dist.TCPStore(host, port, 2, is_master=False)
        end = End(1, dist.PrefixStore(prefix, store), task.memory)

        def pull() -> None:
            end.go(PULL)
            end.receive(task.dst_ids)

        def push() -> None:
            end.go(PUSH)
            end.send(task.src_ids)
            end.next()

        yield push if task.push else pull
        end.go(STOP)
