# SPDX-License-Identifier: Apache-2.0
"""``run`` is to a program what ``python`` is: output, errors, status, ``__main__``, children."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from llm_datadist_torch.compat.switch import shim_path
from tests.compat.programs import run_module, run_python

pytestmark = pytest.mark.thorough

PROGRAM = """
import atexit, os, pickle, sys, threading, time
import llm_datadist

class Mine:
    pass

def at_the_end():
    # pickle looks the class up in sys.modules["__main__"].
    print("at the end", type(pickle.loads(pickle.dumps(Mine()))) is Mine)

def later():
    threading.main_thread().join()
    print("thread", sys.modules["__main__"].Mine is Mine)

def deep(kind):
    raise kind("from below")

atexit.register(at_the_end)
threading.Thread(target=later).start()
print(__name__, __file__, __package__, __spec__, __doc__, sys.argv, sys.path[0])
if __name__ == "__main__":
    what = sys.argv[1]
    if what == "status":
        sys.exit(7)
    if what == "text":
        sys.exit("a last word")
    if what == "raise":
        deep(ValueError)
    if what == "chain":
        try:
            deep(ValueError)
        except ValueError as error:
            raise KeyError("on top") from error
    if what == "interrupt":
        deep(KeyboardInterrupt)
    if what == "hook":
        sys.excepthook = lambda kind, error, trace: print("hook", kind, trace.tb_lineno)
        deep(ValueError)
    if what == "exec":
        exec(compile("1 +", "text", "exec"))
"""

WAYS = ["ok", "status", "text", "raise", "chain", "interrupt", "hook", "exec"]


def same_as_python(*command: str) -> None:
    """What ``python`` and ``run`` make of one command line."""
    expected = run_python(*command, path=shim_path())
    found = run_module("run", *command)
    for what in ("returncode", "stdout", "stderr"):
        assert getattr(found, what) == getattr(expected, what), what


@pytest.mark.parametrize("way", WAYS)
def test_a_program_ends_as_under_python(tmp_path: Path, way: str):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    same_as_python(str(path), way, "--force", "-m", "--", "-h", "{}")


def test_programs_that_python_cannot_start(tmp_path: Path):
    broken = tmp_path / "broken.py"
    broken.write_text("x = (\n")
    for program in (broken, tmp_path / "missing.py"):
        same_as_python(str(program))


def test_a_linked_program_finds_its_neighbours(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "neighbour.py").write_text("NAME = 'neighbour'\n")
    (tmp_path / "real" / "program.py").write_text("import neighbour; print(neighbour.NAME)\n")
    link = tmp_path / "link.py"
    link.symlink_to(tmp_path / "real" / "program.py")
    assert run_module("run", str(link)).stdout == "neighbour\n"


@pytest.fixture
def package(tmp_path: Path) -> str:
    """A directory with packages to run by name."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").touch()
    body = "import sys, llm_datadist\nprint({!r}, __name__, __package__, __spec__.name, sys.argv)\n"
    (tmp_path / "pkg" / "__main__.py").write_text(body.format("package"))
    (tmp_path / "pkg" / "tool.py").write_text(body.format("module") + "sys.exit(3)\n")
    return str(tmp_path)


@pytest.mark.parametrize(("name", "status"), [("pkg", 0), ("pkg.tool", 3)])
def test_modules(package: str, name: str, status: int):
    expected = run_python("-m", name, "-m", "x", path=f"{shim_path()}:{package}")
    found = run_module("run", "-m", name, "-m", "x", path=package)
    assert found.returncode == expected.returncode == status
    assert found.stdout == expected.stdout
    assert not found.stderr


@pytest.mark.parametrize("name", ["no_such_module", "json.no_such_module"])
def test_a_missing_module(name: str):
    done = run_module("run", "-m", name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(f": No module named {name}\n")


def test_it_nests(tmp_path: Path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    done = run_module("run", "-m", "llm_datadist_torch", "run", str(path), "status")
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.endswith("thread True\nat the end True\n")


def test_other_pythons_that_it_starts_see_the_shim(tmp_path: Path):
    path = tmp_path / "program.py"
    path.write_text(
        textwrap.dedent("""
        import subprocess, sys
        code = "import llm_datadist; print(llm_datadist.LLMConfig.__name__)"
        subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
        """)
    )
    assert run_module("run", str(path)).stdout == "LLMConfig\n"


@pytest.mark.parametrize("arguments", [("run",), ("run", "--nonsense", "x.py"), (), ("walk",)])
def test_wrong_command_lines(arguments: tuple[str, ...]):
    done = run_module(*arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr
