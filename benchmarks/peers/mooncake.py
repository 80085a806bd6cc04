# SPDX-License-Identifier: Apache-2.0
"""Mooncake's Transfer Engine over TCP, which is what it has between hosts without RDMA.

Neighbours are merged beforehand, as its users do. Batches are as large as it takes: of 4096 and
more transfers of 4 KiB in one, it fails some.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.peers import Call, Memory, Peer, PeerFailedError, Task

BATCH = 1024


def engines() -> Any:  # noqa: ANN401
    """Its module, without the dozen lines that it logs for each engine."""
    os.environ.setdefault("GLOG_minloglevel", "3")
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    return importlib.import_module("mooncake.engine")


def engine_of(memory: Memory) -> Any:  # noqa: ANN401
    """A started engine that has registered the memory."""
    engine = engines().TransferEngine()
    if engine.initialize(memory.host, "P2PHANDSHAKE", "tcp", ""):
        raise SystemExit("bench: Mooncake's engine does not start")
    for tensor in memory.allocated.tensors:
        if engine.register_memory(tensor.data_ptr(), tensor.nbytes):
            raise SystemExit("bench: Mooncake does not register memory")
    return engine


def release(engine: Any, memory: Memory) -> None:  # noqa: ANN401
    """Take the memory back from an engine."""
    for address in memory.allocated.tensor_addrs:
        engine.unregister_memory(address)


class Mooncake(Peer):
    """Mooncake's Transfer Engine over TCP."""

    name = "Mooncake TCP"
    option = "mooncake"
    hosts = (1, 2)

    def why_not(self) -> str:
        try:
            engines()
        except ImportError as error:
            return (
                f"{error}: pip install mooncake-transfer-engine-non-cuda;"
                " apt-get install --no-install-recommends libibverbs1 libnuma1"
            )
        return ""

    @contextmanager
    def serve(self, memory: Memory) -> Iterator[Any]:
        engine = engine_of(memory)
        yield f"{memory.host}:{engine.get_rpc_port()}", list(memory.allocated.tensor_addrs)
        release(engine, memory)

    @contextmanager
    def mover(self, task: Task) -> Iterator[Call]:
        session, theirs = task.offer
        engine = engine_of(task.memory)
        mine = task.memory.allocated.tensor_addrs
        runs = merged(task.my_ids, task.owner_ids)
        nbytes = task.shape.block_bytes
        here = [base + first * nbytes for base in mine for first, _, _ in runs]
        there = [base + first * nbytes for base in theirs for _, first, _ in runs]
        lengths = [count * nbytes for _ in mine for _, _, count in runs]
        move = engine.batch_transfer_sync_write if task.push else engine.batch_transfer_sync_read

        batches = [
            tuple(each[at : at + BATCH] for each in (here, there, lengths))
            for at in range(0, len(here), BATCH)
        ]

        def call() -> None:
            for batch in batches:
                if move(session, *batch):
                    raise PeerFailedError(f"a batch of {len(batch[0])} transfers failed")

        yield call
        release(engine, task.memory)


def merged(mine: torch.Tensor, theirs: torch.Tensor) -> list[tuple[int, int, int]]:
    """Runs of blocks that are neighbours at both sides: first block at each, and how many."""
    runs: list[tuple[int, int, int]] = []
    for here, there in zip(mine.tolist(), theirs.tolist(), strict=True):
        if runs and (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) == (here, there):
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((here, there, 1))
    return runs
