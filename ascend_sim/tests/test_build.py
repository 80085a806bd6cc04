# SPDX-License-Identifier: Apache-2.0
"""The simulator is compiled on its first use, by one process, whoever else waits for it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = """#!/bin/sh
echo "$@" >>"$LOG"
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then touch "$2"; fi
  shift
done
sleep 0.05
"""

PROGRAM = [sys.executable, "-c", "from ascend_sim.build import build; print(build())"]


def setting(tmp_path: Path) -> dict[str, str]:
    """An environment in which a build is quick and starts from nothing."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    return {
        **os.environ,
        "CXX": str(compiler),
        "LOG": str(tmp_path / "log"),
        "ASCEND_SIM_CACHE": str(tmp_path / "cache"),
    }


@pytest.mark.needs_torch_npu
def test_processes_that_start_together_compile_it_once(tmp_path: Path) -> None:
    environment = setting(tmp_path)
    started = [
        subprocess.Popen(PROGRAM, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    (folder,) = answers
    commands = (tmp_path / "log").read_text().splitlines()
    linked = [command for command in commands if "-shared" in command]
    assert len(linked) == len(list(Path(folder.strip()).glob("*.so")))
    assert len(commands) == len(set(commands))


def on_a_terminal(program: list[str], environment: dict[str, str]) -> bytes:
    """What a program writes to its standard error, which is a terminal."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # its end
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert process.wait() == 0, shown
    return shown


@pytest.mark.needs_rich
@pytest.mark.needs_torch_npu
def test_a_terminal_gets_a_progress_bar_and_a_file_does_not(tmp_path: Path) -> None:
    environment = setting(tmp_path) | {"TERM": "xterm"}
    told = subprocess.run(PROGRAM, env=environment, capture_output=True, check=True).stderr
    assert told.startswith(b"building the simulated Ascend runtime in ")
    assert told.count(b"\n") == 1
    environment["ASCEND_SIM_CACHE"] += "2"
    assert b"compiling" in on_a_terminal(PROGRAM, environment)
