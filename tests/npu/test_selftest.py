# SPDX-License-Identifier: Apache-2.0
"""``doctor --npu-selftest``: what it holds to be the simulated runtime's answers are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compat.programs import ROOT

# It starts eight programs, one after the other.
pytestmark = [
    pytest.mark.needs_simulated_npu,
    pytest.mark.whole_programs,
    pytest.mark.timeout(900),
]


def test_every_step_is_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "llm_datadist_torch", "doctor", "--npu-selftest", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "send this file back" in done.stdout
    report = json.loads(path.read_text())
    steps = report["steps"]
    assert {name: step for name, step in steps.items() if not step["ok"]} == {}
    assert len(steps) == 8
    assert report["ended"] == "with status 0"
    # What it was run on.
    assert report["simulated"] is True
    assert report["doctor"]["versions"]["torch_npu"] != "not installed"
    assert len(steps["device"]["facts"]["devices"]) == 2
    # Each transport moved its bytes.
    assert steps["between processes by hixl"]["facts"]["paths"] == ["hixl"]
    assert steps["between processes by local"]["facts"]["paths"] == ["device-ipc"]
