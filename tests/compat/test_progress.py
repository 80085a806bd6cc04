# SPDX-License-Identifier: Apache-2.0
"""Progress bars: on a terminal only, on standard error only."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from tests.compat.programs import ROOT

WORK = """
from llm_datadist_torch.cli.progress import progress_bar
with progress_bar("some work", 3) as done:
    for number in (1, 2, 3):
        print("line", number)
        done(number)
"""
LINES = b"line 1\nline 2\nline 3\n"
WITHOUT_RICH = "import sys; sys.modules['rich'] = None\n"


def run(program: str) -> tuple[bytes, bytes]:
    """Run it with a terminal as standard error; what it wrote to standard output, and there."""
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # its end
            while piece := os.read(ours, 65536):
                shown += piece
        os.close(ours)
        assert process.stdout is not None
        printed = process.stdout.read()
    assert process.returncode == 0, shown
    return printed, shown


@pytest.mark.needs_rich
def test_a_terminal_gets_a_bar():
    printed, shown = run(WORK)
    assert b"some work" in shown
    assert b"100%" in shown
    assert printed == LINES, "what is printed into a file stays there"


def test_without_rich_there_is_no_bar():
    printed, shown = run(WITHOUT_RICH + WORK)
    assert (printed, shown) == (LINES, b"")


def test_without_a_terminal_nothing_is_written():
    done = subprocess.run(
        [sys.executable, "-c", WORK], capture_output=True, cwd=ROOT, timeout=90, check=True
    )
    assert (done.stdout, done.stderr) == (LINES, b"")
