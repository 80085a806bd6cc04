# SPDX-License-Identifier: Apache-2.0
"""Importing the package does nothing but define names, and all of them are documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import llm_datadist_torch

pytestmark = pytest.mark.thorough

ROOT = Path(llm_datadist_torch.__file__).parent

# What others (torch, msgspec) do at import is not ours, so they come before the first look.
PROBE = """
    import atexit, logging, os, sys, threading
    import torch, torch.library, msgspec, logging.handlers
    events = []
    def hook(name, args):
        if name in ("socket.__new__", "socket.bind", "subprocess.Popen", "os.putenv", "os.fork",
                    "os.unsetenv", "_thread.start_new_thread", "mmap.__new__"):
            events.append(name)
    reads = []
    environ = type(os.environ)
    real = environ.__getitem__
    def getitem(self, key):
        frame, files = sys._getframe(1), []
        while frame and len(files) < 3:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        if any("llm_datadist_torch" in file for file in files):
            reads.append(key)
        return real(self, key)
    def look():
        return {
            "threads": (threading.active_count(), len(os.listdir("/proc/self/task"))),
            "files": len(os.listdir("/proc/self/fd")),
            "environment": dict(os.environ),
            "root handlers": list(logging.root.handlers),
            "root level": logging.root.level,
            "our handlers": list(logging.getLogger("llm_datadist_torch").handlers),
            "our level": logging.getLogger("llm_datadist_torch").level,
            "atexit": atexit._ncallbacks(),
            "memfds": sum("memfd" in line for line in open("/proc/self/maps")),
        }
    before = look()
    environ.__getitem__ = getitem
    sys.addaudithook(hook)
    IMPORT
    environ.__getitem__ = real
    after = look()
    for name in before:
        assert before[name] == after[name], (name, before[name], after[name])
    assert not events, events
    assert not reads, reads
    assert "torch_npu" not in sys.modules
    assert not torch.cuda.is_initialized()
    EXTRA
    print("clean")
"""


def run(what: str, extra: str = "") -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(PROBE).replace("IMPORT", what).replace("EXTRA", extra)
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        cwd=ROOT.parent,
    )


@pytest.mark.parametrize("what", ["import llm_datadist_torch", "from llm_datadist_torch import *"])
def test_import_has_no_side_effects(what):
    done = run(what)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clean\n"
    assert done.stderr == ""


def test_the_exit_handler_comes_with_the_first_init():
    done = run(
        "from llm_datadist_torch import *",
        textwrap.dedent("""
            for i in range(2):
                datadist = LLMDataDist(LLMRole.MIX, i)
                assert atexit._ncallbacks() == before["atexit"] + (i > 0)
                datadist.init({"llm.EnableCacheManager": "1"})
                assert atexit._ncallbacks() == before["atexit"] + 1
                datadist.finalize()
        """),
    )
    assert done.stdout == "clean\n", done.stderr


# -- names ----------------------------------------------------------------------------------------

REFERENCE_NAMES = [
    "LLMClusterInfo",
    "LLMStatusCode",
    "LLMException",
    "LLMRole",
    "LlmConfig",
    "LLMConfig",
    "DataType",
    "Status",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "KvCache",
    "Cache",
    "BlocksCacheKey",
    "LLMDataDist",
    "Placement",
    "RegisterMemStatus",
    "LayerSynchronizer",
    "TransferConfig",
    "CacheTask",
    "TransferWithCacheKeyConfig",
    "Memtype",
    "MemInfo",
]


def test_star_import_gives_exactly_all():
    space: dict[str, object] = {}
    exec("from llm_datadist_torch import *", space)
    del space["__builtins__"]
    assert set(space) == set(llm_datadist_torch.__all__)


def test_all_is_sorted_and_complete():
    names = llm_datadist_torch.__all__
    assert names == sorted(set(names))
    public = {
        name
        for name, value in vars(llm_datadist_torch).items()
        if not name.startswith("_") and inspect.isclass(value)
    }
    assert public == {name for name in names if inspect.isclass(getattr(llm_datadist_torch, name))}


def test_the_names_of_the_reference_are_there():
    assert set(REFERENCE_NAMES) - set(llm_datadist_torch.__all__) == set()
    assert llm_datadist_torch.LLMConfig is llm_datadist_torch.LlmConfig


def test_unknown_names():
    with pytest.raises(AttributeError, match="has no attribute"):
        _ = llm_datadist_torch.no_such_name


# -- documentation --------------------------------------------------------------------------------


def public_members() -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name in llm_datadist_torch.__all__:
        value = getattr(llm_datadist_torch, name)
        found.append((name, value))
        for owner in value.__mro__ if inspect.isclass(value) else ():
            if owner.__module__.startswith("llm_datadist_torch"):
                for member, what in vars(owner).items():
                    callable_ = isinstance(what, (property, classmethod, staticmethod))
                    if not member.startswith("_") and (callable_ or inspect.isfunction(what)):
                        found.append((f"{name}.{member}", what))
    return found


MEMBERS = public_members()


@pytest.mark.parametrize(("name", "what"), MEMBERS, ids=[name for name, _ in MEMBERS])
def test_public_members_are_documented(name, what):
    assert inspect.getdoc(what), f"{name} has no docstring"


def raising_functions() -> list[tuple[str, ast.AST]]:
    """Public functions and methods of the package that have a raise statement of their own."""
    found: list[tuple[str, ast.AST]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}.{child.name}")
            elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                own = [n for n in own_nodes(child) if isinstance(n, ast.Raise) and n.exc]
                if own:
                    found.append((f"{prefix}.{child.name}", child))

    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        visit(ast.parse(path.read_text()), module)
    return found


def own_nodes(function: ast.AST) -> list[ast.AST]:
    """The nodes of a function without those of functions in it."""
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            nodes += [child, *own_nodes(child)]
    return nodes


PUBLIC_API = (
    "caches.cache.Cache.",
    "api.datadist.",
    "api.cache_manager.",
    "values.",
    "memory.",
    "movement.ops.",
)
RAISING = [(name, node) for name, node in raising_functions() if name.startswith(PUBLIC_API)]


@pytest.mark.parametrize(("name", "node"), RAISING, ids=[name for name, _ in RAISING])
def test_functions_that_raise_say_what(name, node):
    assert "Raises" in (ast.get_docstring(node) or "") or "Error" in (
        ast.get_docstring(node) or ""
    ), f"{name} raises, and its docstring does not say what"
