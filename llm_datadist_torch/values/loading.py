# SPDX-License-Identifier: Apache-2.0
"""Loads torch, the compiled part and rarely used modules, or says what a machine lacks for them.

It imports nothing of torch by itself, so that ``doctor`` and ``--version`` work without it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_datadist_torch.values.status import LLMLoadError
from llm_datadist_torch.values.version import VERSION

# The first that has DLPack's C interface, through which the compiled part sees tensors.
OLDEST_TORCH = (2, 10)
OLDEST_PYTHON = (3, 10)

_NAME = "llm_datadist_torch._C"
_MISSING_VERSION = re.compile(r"version `((?:GLIBCXX|GLIBC|CXXABI)_[\d.]+)' not found")
_REINSTALL = (
    "install the wheel for this machine: pip install --force-reinstall --no-deps"
    " llm_datadist_torch; or build it here, with a C++17 compiler: pip install --force-reinstall"
    " --no-deps --no-binary llm_datadist_torch llm_datadist_torch"
)


class LazyModule(ModuleType):
    """Stands for a module that is imported when one of its names is first used.

    Ctrl-C comes through when the import has ended: one that stops halfway can't be tried again,
    since torch keeps the ops that it has registered.

    Thread safety: any thread may use it, as Python's import waits for another thread's.

    Args:
        name: The whole name of the module.
    """

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the module has)
        with ThreadPoolExecutor(1) as other:  # signals interrupt the main thread only
            module = other.submit(importlib.import_module, self.__name__).result()
        vars(self).update(vars(module))
        return getattr(module, name)


def machine() -> str:
    """What errors say of this machine."""
    library, version = platform.libc_ver()
    return (
        f"Python {platform.python_version()} at {sys.executable},"
        f" {platform.system()} {platform.machine()}, {library or 'no glibc'} {version}".rstrip()
    )


def load_torch() -> ModuleType:
    """The module torch, of a release that serves.

    Raises:
        LLMLoadError: There is no torch here, it can't be loaded, or it is too old.
    """
    needed = ".".join(map(str, OLDEST_TORCH))
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise LLMLoadError(
            f"llm_datadist_torch {VERSION} needs torch {needed} or later, and none is installed"
            f" ({machine()}).",
            remedy=f"pip install 'torch>={needed}'",
        ) from error
    found = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if found and tuple(map(int, found.groups())) < OLDEST_TORCH:
        raise LLMLoadError(
            f"llm_datadist_torch {VERSION} needs torch {needed} or later, and this is"
            f" {torch.__version__} ({machine()}).",
            remedy=f"pip install 'torch>={needed}'; under torch_npu, the release of it that fits",
        )
    return torch


def load_extension() -> ModuleType:
    """The compiled part, `_C`.

    Raises:
        LLMLoadError: This machine can't load it, or it is of another version than the rest.
    """
    if sys.version_info[:2] < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        raise LLMLoadError(
            f"llm_datadist_torch {VERSION} needs CPython {needed} or later ({machine()}).",
            remedy=f"make the environment anew with a Python from {needed} on",
        )
    load_torch()
    try:
        extension = importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            raise
        raise LLMLoadError(_why_none(), remedy=_REINSTALL) from error
    except ImportError as error:
        raise LLMLoadError(_why_not_loaded(str(error)), remedy=_REINSTALL) from error
    facts = getattr(extension, "build_facts", list)  # builds of before it say no version
    built = dict(facts()).get("version", "an older build")
    if built != VERSION:
        raise LLMLoadError(
            f"The compiled part {extension.__file__} is of {built}, the package of {VERSION}.",
            remedy="install it anew; in a checkout, python setup.py build_ext --inplace",
        )
    return extension


def _why_none() -> str:
    package = Path(__file__).parents[1]
    found = ", ".join(sorted(path.name for path in package.glob("_C*.so"))) or "none"
    suffixes = ", ".join(importlib.machinery.EXTENSION_SUFFIXES)
    return (
        f"llm_datadist_torch {VERSION} has no compiled part that this Python loads ({machine()}):"
        f" in {package} is {found}, its names end in {suffixes}."
    )


def _why_not_loaded(reason: str) -> str:
    versions = _MISSING_VERSION.findall(reason)
    if not versions:
        return (
            f"The compiled part of llm_datadist_torch {VERSION} can't be loaded: {reason}"
            f" ({machine()})."
        )
    what = "glibc" if versions[0].startswith("GLIBC_") else "libstdc++"
    return (
        f"The compiled part of llm_datadist_torch {VERSION} was built for a newer {what} than this"
        f" machine's: it needs {versions[0]} ({machine()}): {reason}."
    )
