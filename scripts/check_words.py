# SPDX-License-Identifier: Apache-2.0
"""Check that identifiers use the project's words: one word per idea (docs/design.md, "Words").

Reads Python by its syntax tree (names, attributes, arguments, classes, functions) and C++ by its
identifiers, so that texts and comments don't count.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_ROOTS = ("llm_datadist_torch", "tests", "benchmarks", "examples", "ascend_sim", "scripts")
CPP_ROOTS = ("csrc", "ascend_sim", "tests/native")

INSTEAD = {
    "stride": "row_bytes, or row_stride_bytes for the distance of two starts",
    "pitch": "row_stride_bytes",
    "Conduit": "CancellableProxy",
    "Way": "LocalPath",
    "WayClosedError": "PathUnavailable",
    "ways": "paths",
    "Presence": "SameProcessPeer",
    "Neighbour": "SameProcessPeer",
    "neighbour": "same_process_peer",
    "ask": "query, or request",
    "tell": "send",
    "on_question": "on_request",
    "Words": "CacheVersion",
    "measures": "extent",
    "spelled_out": "expanded",
    "Holder": "LeaseTicket",
    "admit": "add_owner",
    "dismiss": "remove_owner",
    "hold": "acquire",
    "let_go": "release",
    "Doorkeeper": "ZapHandler",
    "Seal": "MessageAuthenticator",
    "settle": "synchronize",
    "over": "closed",
    "keeps": "cache_resolution",
    "after": "wait_for",
    "holds": "still_valid",
    "is_foreign": "is_unowned",
    "Siblings": "LoadDeduplicator",
    "Turn": "Decision",
    "asks_owner": "owner_validates",
}
"""Words that are no longer used for an idea -> the word for it."""

ALLOWED = {
    # Deprecated public names, for one release.
    "llm_datadist_torch/api/datadist.py": {"ask", "tell", "on_question"},
    "tests/transfer/test_questions.py": {"ask", "tell", "on_question"},
}
TORCHS_OWN = {"stride"}
"""Methods of torch's tensors: allowed as attributes."""

_IDENTIFIER = re.compile(r"\b[A-Za-z_]\w*\b")
_NO_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


def python_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every identifier that a Python file defines or uses."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and node.attr not in TORCHS_OWN:
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def cpp_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every identifier of a C++ file."""
    text = _NO_CODE.sub(lambda found: "\n" * found[0].count("\n"), path.read_text(encoding="utf-8"))
    for number, line in enumerate(text.splitlines(), 1):
        for name in _IDENTIFIER.findall(line):
            yield number, name


def problems() -> Iterator[str]:
    """One line for each identifier that is not one of the project's words."""
    files = [(path, python_names) for root in PYTHON_ROOTS for path in (ROOT / root).rglob("*.py")]
    for root in CPP_ROOTS:
        for suffix in ("*.cpp", "*.h"):
            files += [(path, cpp_names) for path in (ROOT / root).rglob(suffix)]
    for path, names in sorted(files, key=lambda file: file[0]):
        shown = str(path.relative_to(ROOT))
        for line, name in names(path):
            word = name.lstrip("_")
            if word in INSTEAD and word not in ALLOWED.get(shown, ()):
                yield f"{shown}:{line}: {name}: say {INSTEAD[word]}"


def main() -> int:
    """Print the problems; 1 if there are any."""
    found = list(problems())
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
