# SPDX-License-Identifier: Apache-2.0
"""What a wheel would hold: every file of the package, also those that are in no package of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".pyi", ".typed", ".h", ".cpp"}


def test_every_file_of_the_package_is_in_the_wheel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["pyproject.toml"])
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    modules = {Path(file) for _, _, file in command.find_all_modules()}
    data = {Path(where) / name for _, where, _, names in command.data_files for name in names}
    packed = {path.resolve() for path in modules | data}
    ours = {path for path in (ROOT / "llm_datadist_torch").rglob("*") if path.suffix in SUFFIXES}
    assert ours - packed == set()
