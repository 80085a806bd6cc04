# SPDX-License-Identifier: Apache-2.0
"""Switches ``import llm_datadist`` on by one means: a directory on ``sys.path`` that has the name.

So it is visible, spawned processes inherit it, and nothing happens in a program that did not ask.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

NAME = "llm_datadist"

_HERE = Path(__file__).resolve().parent
_lock = threading.Lock()


class ShimConflictError(ImportError):
    """There is a package ``llm_datadist`` already, and nobody asked to replace it."""


def shim_path(*, force: bool = False) -> str:
    """The directory that makes ``import llm_datadist`` work when it is on ``sys.path``.

    Args:
        force: Whether it goes before an installed package of that name, or steps aside for it.
    """
    return str(_HERE / ("shim_force" if force else "shim"))


def tree_path() -> list[str]:
    """Where the modules of the tree are: the ``__path__`` of the package that stands for it."""
    return [str(_HERE / "tree")]


def install(*, force: bool = False) -> None:
    """Make ``import llm_datadist`` mean this package, from now on and in spawned processes.

    Idempotent; may be called from any thread. Programs that can't be changed are switched on from
    outside: see docs/migrating.md.

    Args:
        force: Replace a package ``llm_datadist`` that is installed.

    Raises:
        ShimConflictError: Such a package is installed, and ``force`` is not given; or it has been
            imported already, so that replacing it would leave two of each class.
    """
    with _lock:
        loaded = sys.modules.get(NAME)
        if loaded is not None and not _is_ours(getattr(loaded, "__spec__", None)):
            raise ShimConflictError(
                f"another {NAME} has been imported already, from"
                f" {getattr(loaded, '__file__', None)}: call install() before it is imported",
                name=NAME,
            )
        real = None if force else find_installed()
        if real is not None:
            raise ShimConflictError(
                f"{NAME} is installed at {real.origin}, and is not replaced without"
                " install(force=True)",
                name=NAME,
            )
        directory = shim_path(force=force)
        if directory in sys.path:
            return
        # At the end it is in nobody's way; only force must come before the installed package.
        sys.path.insert(0 if force else len(sys.path), directory)


def find_installed() -> ModuleSpec | None:
    """The package ``llm_datadist`` that is installed besides ours, or None. Nothing is imported."""
    ours = {Path(shim_path()), Path(shim_path(force=True))}
    # Resolved, because PYTHONPATH may have them with a slash at the end, or through a link.
    others = [entry for entry in sys.path if Path(entry).resolve() not in ours]
    for finder in sys.meta_path:
        path = others if finder is PathFinder else None
        spec = finder.find_spec(NAME, path)
        # A directory that merely has the name (no loader) gives way to any package.
        if spec is not None and spec.loader is not None and not _is_ours(spec):
            return spec
    return None


def step_aside() -> bool:
    """Load the installed package in place of the shim that is being imported, if there is one.

    Returns:
        Whether there is; ``sys.modules`` has it then.
    """
    real = find_installed()
    if real is None or real.loader is None:
        return False
    warnings.warn(
        f"{NAME} is installed at {real.origin} and is used; `python -m llm_datadist_torch shim-path"
        " --force` gives a path that replaces it",
        RuntimeWarning,
        stacklevel=2,
    )
    module = importlib.util.module_from_spec(real)
    # The import system takes what it finds here in the end.
    sys.modules[NAME] = module
    real.loader.exec_module(module)
    return True


def _is_ours(spec: ModuleSpec | None) -> bool:
    origin = None if spec is None else spec.origin
    return origin is not None and Path(origin).resolve().is_relative_to(_HERE)
