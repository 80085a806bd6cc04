# SPDX-License-Identifier: Apache-2.0
"""The three ways to switch ``import llm_datadist`` on, and what stays as it is."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from llm_datadist_torch.compat.switch import shim_path
from tests.compat.programs import run_module, run_python

pytestmark = pytest.mark.thorough

PROGRAM = """
import sys
import llm_datadist
import llm_datadist_torch
print(sys.argv[1:], __name__, llm_datadist.Cache is llm_datadist_torch.Cache)
sys.exit(7)
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


@pytest.fixture
def real(tmp_path: Path) -> str:
    """A directory with somebody else's llm_datadist."""
    package = tmp_path / "site" / "llm_datadist"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("Cache = 'the real one'\n")
    return str(package.parent)


def test_run(program: str):
    done = run_module("run", program, "a", "--force", "-h")
    assert (done.returncode, done.stdout) == (7, "['a', '--force', '-h'] __main__ True\n"), done


def test_the_shim_on_pythonpath(program: str):
    path = run_module("shim-path").stdout.strip()
    assert path == shim_path()
    done = run_python(program, path=path)
    assert (done.returncode, done.stdout) == (7, "[] __main__ True\n"), done


def test_install(tmp_path: Path):
    path = tmp_path / "program.py"
    path.write_text("import llm_datadist_torch\nllm_datadist_torch.install()\n" * 2 + PROGRAM)
    assert run_python(str(path)).stdout == "[] __main__ True\n"


def test_without_any_of_them_there_is_no_such_package(program: str):
    assert "No module named 'llm_datadist'" in run_python(program).stderr


def test_spawned_children_see_it(tmp_path: Path):
    path = tmp_path / "parent.py"
    path.write_text(
        textwrap.dedent("""
        import multiprocessing
        def child():
            import llm_datadist
            print("child", llm_datadist.__name__, flush=True)
        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=child)
            process.start()
            process.join()
        """)
    )
    assert run_module("run", str(path)).stdout == "child llm_datadist\n"


def test_the_programs_traceback_is_its_own(tmp_path: Path):
    path = tmp_path / "broken.py"
    path.write_text("def fails():\n    raise KeyError('mine')\nfails()\n")
    done = run_module("run", str(path))
    assert done.returncode == 1
    assert "KeyError: 'mine'" in done.stderr
    assert "cli/run.py" not in done.stderr


def test_a_missing_program():
    done = run_module("run", "/no/such/program.py")
    assert done.returncode == 2
    assert "can't open file" in done.stderr


def test_an_installed_package_is_not_replaced(program: str, real: str):
    done = run_module("run", program, path=real)
    assert done.returncode == 2
    assert "--force" in done.stderr


def test_an_installed_package_is_replaced_when_asked(program: str, real: str):
    assert run_module("run", "--force", program, path=real).stdout == "[] __main__ True\n"


def test_the_shim_steps_aside(real: str):
    code = "import llm_datadist; print(llm_datadist.Cache)"
    done = run_python("-c", code, path=f"{shim_path()}:{real}")
    assert done.stdout == "the real one\n"
    assert "is used" in done.stderr


def test_doctor():
    done = run_module("doctor")
    assert done.returncode == 0, done.stdout
    for word in ("torch", "shared-mapping", "process-memory", "relay", "torch_npu"):
        assert word in done.stdout
