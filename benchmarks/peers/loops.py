# SPDX-License-Identifier: Apache-2.0
"""The ceilings: C loops that do nothing but move the bytes, with the best number of threads."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Call, Memory, Peer, Task
from llm_datadist_torch import _C


def compiler() -> str | None:
    """A C compiler."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def why_no_compiler() -> str:
    """Why there are no C loops; "" where there are."""
    return "" if compiler() else "no C compiler: apt-get install gcc"


@cache
def library(source: str = "peers/loops.c") -> ctypes.CDLL:
    """A C file of the benchmarks, compiled as a release build would be."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "built.so"
        path = Path(__file__).parent.parent / source
        flags = ["-O3", "-shared", "-fPIC", "-pthread"]
        subprocess.run([str(compiler()), *flags, str(path), "-o", str(built)], check=True)
        return ctypes.CDLL(str(built), use_errno=True)


def array(values: Sequence[int] | torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    """An array of int64 for C."""
    numbers = values.tolist() if isinstance(values, torch.Tensor) else list(values)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def quickest(calls: Sequence[Call]) -> Call:
    """The quickest of some calls that do the same, each tried three times."""

    def best_of(call: Call) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    return min(calls, key=best_of)


def loop(
    dst: Sequence[int],
    src: Sequence[int],
    dst_ids: torch.Tensor,
    src_ids: torch.Tensor,
    block_bytes: int,
    pid: int = 0,
    write: bool = False,
) -> Call:
    """A loop over blocks of tensors at those addresses, with the quickest number of threads."""
    arrays = array(dst), array(src), array(dst_ids), array(src_ids)
    move = library().move_blocks
    wide = ctypes.c_int64

    def call(threads: int) -> None:
        to, of, to_ids, of_ids = arrays
        counts = wide(len(dst_ids)), wide(block_bytes), wide(threads)
        if move(pid, int(write), to, of, wide(len(dst)), to_ids, of_ids, *counts):
            raise OSError(ctypes.get_errno(), "the C loop failed")

    cores = len(os.sched_getaffinity(0))
    return quickest([lambda n=n: call(n) for n in range(1, cores + 1)])  # type: ignore[misc]


def between(task: Task, theirs: Sequence[int], pid: int = 0) -> Call:
    """The loop of a task, with the addresses of the owner's tensors."""
    mine = task.memory.allocated.tensor_addrs
    dst, src = (theirs, mine) if task.push else (mine, theirs)
    block_bytes = task.shape.block_bytes
    return loop(dst, src, task.dst_ids, task.src_ids, block_bytes, pid, write=task.push)


class MappingLoop(Peer):
    """One memcpy for each block, out of or into a mapping of the owner's memory."""

    name = "C loop over a mapping"
    option = "mapping"
    role = "ceiling"

    def why_not(self) -> str:
        return why_no_compiler()

    @contextmanager
    def serve(self, memory: Memory) -> Iterator[Any]:
        catalog = memory.node.datadist._instance.catalog  # noqa: SLF001
        region = catalog.find(memory.allocated.cache_id).region
        offsets = [address - region.address for address in memory.allocated.tensor_addrs]
        yield (os.getpid(), region.fd, region.inode, region.device, region.nbytes), offsets

    @contextmanager
    def mover(self, task: Task) -> Iterator[Call]:
        place, offsets = task.offer
        mapping = _C.PeerMapping.open(*place)
        yield between(task, [mapping.address + offset for offset in offsets])
        del mapping


class ProcessMemoryLoop(Peer):
    """process_vm_readv or process_vm_writev, 1024 blocks for each call."""

    name = "process_vm loop"
    option = "readv"
    role = "ceiling"
    memory = "registered"

    def why_not(self) -> str:
        return why_no_compiler()

    @contextmanager
    def serve(self, memory: Memory) -> Iterator[Any]:
        yield os.getpid(), list(memory.cache("registered").tensor_addrs)

    @contextmanager
    def mover(self, task: Task) -> Iterator[Call]:
        pid, addresses = task.offer
        yield between(task, addresses, pid)
