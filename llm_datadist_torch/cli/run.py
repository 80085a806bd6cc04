# SPDX-License-Identifier: Apache-2.0
"""Runs a program as ``python program.py`` would, with ``import llm_datadist`` switched on."""

from __future__ import annotations

import builtins
import importlib.util
import io
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from llm_datadist_torch.compat.switch import install, shim_path
from llm_datadist_torch.values.environment import add_to_pythonpath


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut a command line in two: ours, and from the program on the program's own.

    argparse would take the program's options for ours.
    """
    if "run" not in arguments[:1]:
        return list(arguments), []
    at = 1
    while at < len(arguments) and arguments[at].startswith("-"):
        if arguments[at] == "--":
            return list(arguments[:at]), list(arguments[at + 1 :])
        at += 1
        if arguments[at - 1] == "-m":
            break
    return list(arguments[:at]), list(arguments[at:])


def prepare(command: Sequence[str], *, force: bool, is_module: bool) -> None:
    """Set up ``sys.path`` and the children's PYTHONPATH.

    Args:
        command: Program or module, and its arguments.
        force: Replace an installed package.
        is_module: Whether it is a module.

    Raises:
        ShimConflictError: A package ``llm_datadist`` is installed, and ``force`` is not given.
    """
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        home = Path.cwd() if is_module else Path(command[0]).resolve().parent
        sys.path[0] = str(home)
    install(force=force)
    add_to_pythonpath(shim_path(force=force))


def run(command: Sequence[str], *, is_module: bool) -> int:
    """Run it; what it raises, SystemExit too, goes on to the interpreter.

    Args:
        command: Program or module, and its arguments: its ``sys.argv``.
        is_module: Whether it is a module.

    Returns:
        0; or, as python has it, 2 if there is no such file, 1 if there is no such module.
    """
    sys.argv = list(command)
    # runpy would take __main__ away when the program's last line is done, while its threads and
    # exit handlers still need it.
    main = ModuleType("__main__")
    code: CodeType | None = None
    try:
        code = _load_module(main, command[0]) if is_module else _load_file(main, command[0])
        sys.modules["__main__"] = main
        exec(code, vars(main))  # noqa: S102 (that is what running a program is)
    except _MissingError as missing:
        sys.stderr.write(f"{sys.executable}: {missing}\n")
        return 1 if is_module else 2
    except BaseException:
        _hide_our_frames(code)
        raise
    return 0


class _MissingError(Exception):
    """There is no such program."""


def _load_file(main: ModuleType, name: str) -> CodeType:
    path = str(Path(name).absolute())
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        text = f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}"
        raise _MissingError(text) from None
    vars(main).update(
        __file__=path,
        __builtins__=builtins,
        __loader__=SourceFileLoader("__main__", path),
        __cached__=None,
    )
    return compile(source, path, "exec", dont_inherit=True)


def _load_module(main: ModuleType, name: str) -> CodeType:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not isinstance(spec.loader, InspectLoader):
        raise _MissingError(f"No module named {name}")
    code = spec.loader.get_code(spec.name)
    if code is None:
        raise _MissingError(f"No code object available for {name}")
    vars(main).update(
        __file__=spec.origin,
        __builtins__=builtins,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
        __cached__=spec.cached,
    )
    sys.argv[0] = spec.origin or name
    return code


def _hide_our_frames(code: CodeType | None) -> None:
    """Let the traceback that the interpreter is about to print start with the program's frame."""
    show = sys.excepthook

    def show_theirs(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        start = trace
        while start is not None and start.tb_frame.f_code is not code:
            start = start.tb_next
        # An error on the way to the program has none of its frames; a syntax error needs none.
        if start is None and not isinstance(error, SyntaxError):
            start = trace
        error.__traceback__ = start
        show(kind, error, start)

    sys.excepthook = show_theirs
