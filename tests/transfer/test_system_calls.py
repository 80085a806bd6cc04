# SPDX-License-Identifier: Apache-2.0
"""System calls of a pull: none for a known cache, as README says; one per 1024 runs otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.needs_strace, pytest.mark.host_memory_only]

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os
import torch
from llm_datadist_torch import BlocksCacheKey
from tests.peers import Service, spawn

if __name__ == "__main__":
    here, peer = Service(), spawn()
    here.start(1, remote=True, device="cpu")
    here.link(2, peer.call("start", 2, remote=True, device="cpu"))
    key, manager = BlocksCacheKey(2), here.manager
%s
    peer.close()
    here.finish()
"""
"""Two linked instances; what they do is put in."""
KNOWN = """
    peer.call("make", "allocated", "theirs", 4, 64, 16384, paged=True, keys=key)
    here.make("allocated", "mine", 4, 64, 16384, paged=True)
    cache = here.held["mine"].cache
    for _ in range(50):
        manager.pull_blocks(key, cache, [0], [0])
    os.write(1, b"begin")
    for _ in range(100):
        manager.pull_blocks(key, cache, [0], [0])
    os.write(1, b"end")
"""
RUNS = (1000, 5000, 20_000)
REGISTERED = f"""
    peer.call("make", "tensors", "theirs", 1, 40_000, 16, paged=True, keys=key)
    here.make("allocated", "mine", 1, 40_000, 16, paged=True)
    cache = here.held["mine"].cache
    for runs in {RUNS}:
        ids = torch.arange(0, 2 * runs, 2)
        os.write(1, b"begin")
        manager.pull_blocks(key, cache, ids, ids)
        os.write(1, b"end")
"""


def traced(tmp_path: Path, what: str) -> list[list[str]]:
    """The main thread's system calls of each stretch between "begin" and "end"."""
    program, trace = tmp_path / "program.py", tmp_path / "trace"
    program.write_text(PROGRAM % what)
    # Of the main thread only, which pulls.
    command = ["strace", "-o", str(trace), sys.executable, str(program)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    stretches: list[list[str]] = []
    inside = False
    for line in trace.read_text().splitlines():
        if '"begin"' in line:
            stretches.append([])
        elif inside and '"end"' not in line:
            stretches[-1].append(line.split("(")[0])
        inside = '"begin"' in line or (inside and '"end"' not in line)
    return stretches


def test_a_known_pull(tmp_path: Path) -> None:
    (calls,) = traced(tmp_path, KNOWN)
    # The interpreter collects garbage now and then, and may get or give back memory for that.
    assert set(calls) <= {"mmap", "munmap", "brk", "madvise", "futex"}
    assert len(calls) < 10


def test_runs_out_of_process_memory(tmp_path: Path) -> None:
    stretches = traced(tmp_path, REGISTERED)
    counted = [calls.count("process_vm_readv") for calls in stretches]
    assert counted == [-(-runs // 1024) for runs in RUNS]
