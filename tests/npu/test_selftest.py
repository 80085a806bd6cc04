# SPDX-License-Identifier: Apache-2.0
"""``doctor --npu-selftest``: what it holds to be the simulated runtime's answers are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compat.programs import ROOT

pytestmark = [pytest.mark.needs_simulated_npu, pytest.mark.whole_programs]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path: Path = tmp_path_factory.mktemp("selftest") / "report.json"
    command = [sys.executable, "-m", "llm_datadist_torch", "doctor", "--npu-selftest", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "send this file back" in done.stdout
    return json.loads(path.read_text())


def test_every_step_is_as_it_says(report: dict) -> None:
    assert {name: step for name, step in report["steps"].items() if not step["ok"]} == {}
    assert len(report["steps"]) == 8
    assert report["ended"] == "with status 0"


def test_a_report_says_what_it_was_run_on(report: dict) -> None:
    assert report["simulated"] is True
    assert report["doctor"]["versions"]["torch_npu"] != "not installed"
    assert len(report["steps"]["device"]["facts"]["devices"]) == 2


def test_each_transport_moved_its_bytes(report: dict) -> None:
    steps = report["steps"]
    assert steps["between processes by hixl"]["facts"]["ways"] == ["hixl"]
    assert steps["between processes by local"]["facts"]["ways"] != ["hixl"]
