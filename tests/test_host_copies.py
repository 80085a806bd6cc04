# SPDX-License-Identifier: Apache-2.0
"""Copies in host memory and arenas, used by several threads at once, under ThreadSanitizer."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "native"
CSRC = Path(__file__).parents[1] / "csrc"
PARTS = ("copy_engine", "stream_copy", "block_order", "runs", "arena")
FLAGS = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-fsanitize=thread")


@pytest.mark.thorough
def test_threads(tmp_path: Path) -> None:
    program = tmp_path / "host_copy_test"
    sources = [HERE / "host_copy_test.cpp", *(CSRC / f"{part}.cpp" for part in PARTS)]
    command = ["g++", *FLAGS, f"-I{CSRC}", *map(str, sources), "-o", str(program), "-lpthread"]
    subprocess.run(command, check=True, timeout=100)
    # ThreadSanitizer's shadow needs addresses that are not at random places; setarch fixes them.
    fixed = ["setarch", platform.machine(), "-R", str(program)]
    done = subprocess.run(fixed, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
