# SPDX-License-Identifier: Apache-2.0
"""A machine that can't load the package gets a typed error that says what it lacks."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llm_datadist_torch
from llm_datadist_torch.values import loading
from tests.compat.programs import ROOT, run_module, run_python

PACKAGE = Path(llm_datadist_torch.__file__).parent
# Without the finder of an editable install, which would find what the copy lacks.
USE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
import llm_datadist_torch
try:
    llm_datadist_torch.LLMConfig
"""
TELL = (
    "except llm_datadist_torch.LLMLoadError as error:\n"
    "    print(isinstance(error, ImportError), error)\n"
)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with the package, whose compiled parts are a test's to spoil."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def library_of(folder: Path) -> Path:
    (library,) = (folder / PACKAGE.name).glob("_C*.so")
    return library


def loaded(folder: Path) -> str:
    """What a program that uses the package of `folder` prints."""
    done = run_python("-c", USE + TELL, path=str(folder), cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def fake_torch(folder: Path, content: str) -> None:
    (folder / "torch.py").write_text(content)


def test_no_torch(tmp_path):
    fake_torch(tmp_path, "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    said = loaded(tmp_path)
    assert said.startswith("True llm_datadist_torch ")
    assert "needs torch 2.10 or later, and none is installed" in said
    assert f"Python {platform.python_version()}" in said
    assert "pip install 'torch>=2.10'" in said


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.0"])
def test_a_torch_that_is_too_old(tmp_path, version: str):
    fake_torch(tmp_path, f"__version__ = {version!r}\n")
    assert f"needs torch 2.10 or later, and this is {version}" in loaded(tmp_path)


def test_no_compiled_part(copied):
    library_of(copied).unlink()
    said = loaded(copied)
    assert "has no compiled part that this Python loads" in said
    assert "Remedy: install the wheel for this machine" in said


def test_a_compiled_part_for_another_machine(copied):
    library_of(copied).write_bytes(b"no library")
    assert "can't be loaded" in loaded(copied)


def test_a_compiled_part_of_another_version(copied):
    file = copied / PACKAGE.name / "values" / "version.py"
    file.write_text(file.read_text().replace(loading.VERSION, "9.9.9"))
    said = loaded(copied)
    assert f"is of {loading.VERSION}, the package of 9.9.9" in said


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (
            "/lib/libc.so.6: version `GLIBC_2.34' not found (required by _C)",
            "newer glibc .* GLIBC_2.34",
        ),
        (
            "libstdc++.so.6: version `GLIBCXX_3.4.29' not found",
            r"newer libstdc\+\+ .* GLIBCXX_3.4.29",
        ),
        (
            "libstdc++.so.6: version `CXXABI_1.3.13' not found",
            r"newer libstdc\+\+ .* CXXABI_1.3.13",
        ),
    ],
)
def test_a_machine_that_is_too_old(monkeypatch, reason: str, words: str):
    def import_module(name: str) -> object:
        if name == "torch":
            return sys.modules["torch"]
        raise ImportError(reason, name=name)

    monkeypatch.setattr(loading.importlib, "import_module", import_module)
    with pytest.raises(loading.LLMLoadError, match=words):
        loading.load_extension()


@pytest.mark.parametrize("spoil", ["torch", "compiled part"])
def test_doctor_reports_it(copied, spoil: str):
    if spoil == "torch":
        fake_torch(copied, "__version__ = '2.9.0'\n")
    else:
        library_of(copied).write_bytes(b"no library")
    done = run_module("doctor", "--json", path=str(copied), cwd=copied)
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert report["problems"] == 1
    (finding,) = report["system"]
    assert (finding["name"], finding["state"]) == ("loading", "wrong")
    assert spoil in finding["detail"]
    assert finding["remedy"]


def test_version_shows_how_it_was_built(copied):
    done = run_module("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"llm_datadist_torch {llm_datadist_torch.__version__}\n")
    for fact in ("compiler: ", "C++ library: ", "glibc: ", "limited API: 0x030A0000"):
        assert fact in done.stdout
    library_of(copied).write_bytes(b"no library")
    done = run_module("--version", path=str(copied), cwd=copied)
    assert (done.returncode, done.stderr) == (0, "")
    assert "compiled part: can't be loaded" in done.stdout


def test_version_imports_no_torch(tmp_path):
    fake_torch(tmp_path, "raise SystemExit('torch was imported')\n")
    assert run_module("--version", path=str(tmp_path), cwd=tmp_path).returncode == 0


def test_the_version_is_written_once():
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == loading.VERSION


# Ctrl-C while init loads what registers ops with torch, of which each can be registered only once.
INTERRUPTED = """
import os, signal, torch
from llm_datadist_torch import LLMDataDist, LLMRole

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
real = torch.library.register_fake
def register_fake(*arguments, **options):
    if torch.library.register_fake is not real:
        torch.library.register_fake = real
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments, **options)
torch.library.register_fake = register_fake

datadist = LLMDataDist(LLMRole.MIX, 1)
try:
    datadist.init({"llm.EnableCacheManager": "1"})
except KeyboardInterrupt:
    print("interrupted", datadist.initialised)
    datadist.init({"llm.EnableCacheManager": "1"})  # the traceback keeps the first try alive
    print(datadist.initialised)
    datadist.finalize()
"""


def test_an_init_that_was_interrupted_as_it_loads_can_be_tried_again():
    done = run_python("-c", INTERRUPTED)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["interrupted", "False", "True"]
