# SPDX-License-Identifier: Apache-2.0
"""Who gets the name ``llm_datadist`` when somebody else has it, and install() from threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_datadist_torch.compat.switch import shim_path
from tests.compat.programs import run_python

OTHER = "Cache = 'the real one'\nimport llm_datadist.part\n"


@pytest.fixture
def real(tmp_path: Path) -> str:
    """A directory with somebody else's llm_datadist, which notes that it was imported."""
    package = tmp_path / "site" / "llm_datadist"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(OTHER)
    (package / "part.py").write_text("print('imported')\n")
    return str(package.parent)


def test_install_refuses_without_importing_it(real: str):
    code = """
import sys, llm_datadist_torch
from llm_datadist_torch.compat.switch import ShimConflictError
before = list(sys.path)
try:
    llm_datadist_torch.install()
except ShimConflictError as error:
    print(isinstance(error, ImportError), "install(force=True)" in str(error), error.name)
assert sys.path == before
import llm_datadist
print(llm_datadist.Cache)
"""
    done = run_python("-c", code, path=real)
    assert done.stdout == "True True llm_datadist\nimported\nthe real one\n", done.stderr


def test_install_by_force(real: str):
    code = """
import llm_datadist_torch
llm_datadist_torch.install(force=True)
import llm_datadist
print(llm_datadist.Cache is llm_datadist_torch.Cache)
"""
    done = run_python("-c", code, path=real)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_what_is_imported_is_not_replaced_even_by_force(real: str):
    code = """
import llm_datadist, llm_datadist_torch
try:
    llm_datadist_torch.install(force=True)
except ImportError as error:
    print("before it is imported" in str(error))
"""
    assert run_python("-c", code, path=real).stdout == "imported\nTrue\n"


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/../shim", "a link"])
def test_the_path_steps_aside_however_it_is_written(real: str, tmp_path: Path, form: str):
    link = tmp_path / "link"
    link.symlink_to(shim_path())
    path = str(link) if form == "a link" else form.format(shim_path())
    code = "import llm_datadist.part; print(llm_datadist.Cache, llm_datadist.part.__name__)"
    done = run_python("-c", code, path=f"{path}:{real}")
    assert done.stdout == "imported\nthe real one llm_datadist.part\n", done.stderr
    assert "RuntimeWarning" in done.stderr


def test_the_path_by_force(real: str):
    code = "import llm_datadist; print(llm_datadist.LLMConfig.__name__)"
    done = run_python("-c", code, path=f"{shim_path(force=True)}:{real}")
    assert (done.stdout, done.stderr) == ("LLMConfig\n", "")


def test_a_broken_installed_package_is_reported_as_it_is(real: str):
    (Path(real) / "llm_datadist" / "part.py").write_text("raise OSError('libascendcl.so')\n")
    done = run_python("-c", "import llm_datadist", path=f"{shim_path()}:{real}")
    assert done.stderr.endswith("OSError: libascendcl.so\n")


def test_a_folder_that_has_the_name_is_no_package(tmp_path: Path):
    (tmp_path / "llm_datadist").mkdir()
    code = """
import llm_datadist_torch
llm_datadist_torch.install()
import llm_datadist
print(llm_datadist.LLMConfig.__name__)
"""
    done = run_python("-c", code, path=str(tmp_path))
    assert (done.stdout, done.stderr) == ("LLMConfig\n", "")


def test_install_from_many_threads_changes_sys_path_once():
    code = """
import sys, threading, llm_datadist_torch
gate, before, found = threading.Barrier(16), len(sys.path), []
def work():
    gate.wait()
    llm_datadist_torch.install()
    import llm_datadist.v2.llm_types
    found.append(llm_datadist.v2.llm_types.Cache is llm_datadist_torch.Cache)
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(sys.path) - before, found == [True] * 16)
"""
    done = run_python("-c", code)
    assert (done.stdout, done.stderr) == ("1 True\n", "")


def test_install_touches_neither_environment_nor_import_hooks():
    code = """
import os, sys, llm_datadist_torch
before = dict(os.environ), list(sys.meta_path), list(sys.path_hooks), "llm_datadist" in sys.modules
llm_datadist_torch.install()
assert before == (dict(os.environ), sys.meta_path, sys.path_hooks, "llm_datadist" in sys.modules)
print("same")
"""
    assert run_python("-c", code).stdout == "same\n"
