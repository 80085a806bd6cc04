# SPDX-License-Identifier: Apache-2.0
"""Installed beside other packages, it changes nothing of theirs and loads nothing unasked."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.same_on_every_device

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
NAME = "llm_datadist_torch"

# What loading vLLM's plugin may import of the package: names, and how to register. Neither torch
# nor the compiled part.
PLUGIN_MODULES = 12
PROBE = """
import json, sys
from importlib import metadata
before = set(sys.modules)
(entry,) = metadata.entry_points(group="vllm.general_plugins", name="llm_datadist")
entry.load()
print(json.dumps(sorted(set(sys.modules) - before)))
"""
# What the first public name of most programs may load beyond torch's modules.
CLASS_MODULES = 40
CLASS_PROBE = """
import sys, torch
before = set(sys.modules)
import llm_datadist_torch
llm_datadist_torch.LLMDataDist(llm_datadist_torch.LLMRole.MIX, 1)
print(*sorted(set(sys.modules) - before))
"""


def required() -> list[str]:
    """What the package requires, without its extras."""
    (listed,) = re.findall(r"^dependencies = \[(.*)\]$", PYPROJECT, re.MULTILINE)
    return re.findall(r'"([^"]+)"', listed)


def test_the_requirements_bind_nobody():
    """No upper bound and no exact version, so no version of another package is changed."""
    names = {re.split(r"[<>=!~\[ ]", each)[0]: each for each in required()}
    assert set(names) == {"torch", "msgspec"}
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", each) for each in names.values()), names


def test_pip_check_has_no_line_about_it():
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    said = done.stdout + done.stderr
    ours = [line for line in said.splitlines() if NAME in line.replace("-", "_")]
    # A line means a requirement of ours that is not met, or one of others on us.
    assert ours == []


def test_it_adds_one_entry_point_and_no_plugin_of_pytest():
    found = {(each.group, each.name) for each in metadata.distribution(NAME).entry_points}
    assert found == {("vllm.general_plugins", "llm_datadist")}
    written = re.findall(r'^\[project\.entry-points\."([^"]+)"\]$', PYPROJECT, re.MULTILINE)
    assert written == ["vllm.general_plugins"]
    assert "[project.scripts]" not in PYPROJECT


def test_loading_the_entry_point_imports_little():
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    ours = [name for name in loaded if name.partition(".")[0] == NAME]
    assert "llm_datadist_torch.vllm" in ours
    assert len(ours) <= PLUGIN_MODULES, ours
    heads = {name.partition(".")[0] for name in loaded}
    assert heads - {NAME} <= set(sys.stdlib_module_names), heads


def test_naming_the_class_loads_little():
    done = subprocess.run(
        [sys.executable, "-c", CLASS_PROBE],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
        cwd=ROOT,
    )
    loaded = done.stdout.split()
    assert f"{NAME}.api.datadist" in loaded
    assert len(loaded) <= CLASS_MODULES, loaded


def commands(target: str, folder: Path) -> str:
    """What make would run for a target where nothing is set up yet."""
    make = shutil.which("make")
    assert make is not None
    return subprocess.run(
        [make, "-n", target, f"VENV={folder / 'new'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_the_demo_installs_what_it_needs_and_nothing_else(tmp_path: Path):
    groups = re.compile(r"--group (\w+)")
    assert groups.findall(commands("demo", tmp_path)) == ["demo"]
    assert groups.findall(commands("lint", tmp_path)) == ["demo", "dev"]
    assert groups.findall(commands("test-cpu", tmp_path)) == ["demo", "dev"]
    (listed,) = re.findall(r"^demo = \[\n(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    names = {re.split(r"[<>=]", each)[0] for each in re.findall(r'^ +"([^"]+)"', listed, re.M)}
    needed = {"torch", "msgspec", "setuptools", "numpy", "transformers", "safetensors"}
    assert names == needed
