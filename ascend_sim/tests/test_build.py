# SPDX-License-Identifier: Apache-2.0
"""The simulator is compiled on its first use, by one process, whoever else waits for it."""

from __future__ import annotations

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


@pytest.mark.needs_torch_npu
def test_processes_that_start_together_compile_it_once(tmp_path: Path) -> None:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment = {
        **os.environ,
        "CXX": str(compiler),
        "LOG": str(log),
        "ASCEND_SIM_CACHE": str(tmp_path / "cache"),
    }
    program = [sys.executable, "-c", "from ascend_sim.build import build; print(build())"]
    started = [
        subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    (folder,) = answers
    commands = log.read_text().splitlines()
    linked = [command for command in commands if "-shared" in command]
    assert len(linked) == len(list(Path(folder.strip()).glob("*.so")))
    assert len(commands) == len(set(commands))
