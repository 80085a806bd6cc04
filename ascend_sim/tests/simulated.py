# SPDX-License-Identifier: Apache-2.0
"""Runs code on simulated NPUs, in processes of its own, many checks in one to save torch's import.

As a program it is the other side: it runs a module's check_ functions and prints what happened.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_MARK = "OUTCOMES "


def environment(**extra: str) -> dict[str, str]:
    """The environment of a process that isn't on simulated NPUs yet, even if this one is."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ASCEND_SIM_") or name == "ASCEND_SIM_CACHE"
    }
    return kept | extra


def simulate(
    *command: str, options: tuple[str, ...] = (), timeout: float = 100, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python command line under ``sim``."""
    sim = [sys.executable, "-m", "ascend_sim", *options, "--", sys.executable]
    return subprocess.run(
        [*sim, *command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
        env=environment(**extra),
    )


def check_names(module: str) -> list[str]:
    """The checks of a module, which can't be imported here."""
    path = ROOT / (module.replace(".", "/") + ".py")
    functions = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    return [function.name for function in functions if function.name.startswith("check_")]


@functools.cache
def outcomes(module: str, options: tuple[str, ...] = (), setting: str = "") -> dict[str, str]:
    """Runs the checks of a module, once. Name -> "" or what went wrong. `setting` is NAME=VALUE."""
    name, _, value = setting.partition("=")
    extra = {name: value} if name else {}
    done = simulate("-m", "tests.simulated", module, options=options, **extra)
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    assert found, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    results: dict[str, str] = json.loads(found[-1].removeprefix(_MARK))
    assert list(results) == check_names(module)
    assert done.returncode == 0, f"at its end: status {done.returncode}\n{done.stderr}"
    return results


def main(module: str) -> None:
    results = {}
    for name in check_names(module):
        try:
            getattr(importlib.import_module(module), name)()
            results[name] = ""
        except (Exception, pytest.fail.Exception):  # noqa: BLE001 (the test says it)
            results[name] = traceback.format_exc()
    print(_MARK + json.dumps(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
