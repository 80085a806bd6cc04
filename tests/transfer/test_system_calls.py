# SPDX-License-Identifier: Apache-2.0
"""A pull of a known cache makes no system call, as README says."""

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
from llm_datadist_torch import BlocksCacheKey
from tests.peers import Ref, Service, spawn

if __name__ == "__main__":
    here, peer = Service(), spawn()
    here.start(1, remote=True, device="cpu")
    here.link(2, peer.call("start", 2, remote=True, device="cpu"))
    key = BlocksCacheKey(2)
    peer.call("make", "allocated", "theirs", 4, 64, 16384, paged=True, keys=key)
    here.make("allocated", "mine", 4, 64, 16384, paged=True)
    manager, cache = here.manager, here.held["mine"].cache
    for _ in range(50):
        manager.pull_blocks(key, cache, [0], [0])
    os.write(1, b"begin")
    for _ in range(100):
        manager.pull_blocks(key, cache, [0], [0])
    os.write(1, b"end")
    peer.close()
    here.finish()
"""


def test_a_known_pull(tmp_path: Path) -> None:
    program, trace = tmp_path / "program.py", tmp_path / "trace"
    program.write_text(PROGRAM)
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
    assert done.stdout == "beginend", done.stderr
    lines = trace.read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if '"begin"' in line)
    end = next(number for number, line in enumerate(lines) if '"end"' in line)
    # The interpreter collects garbage now and then, and may get or give back memory for that.
    calls = [line.split("(")[0] for line in lines[begin + 1 : end]]
    assert set(calls) <= {"mmap", "munmap", "brk", "madvise", "futex"}
    assert len(calls) < 10
