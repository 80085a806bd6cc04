# SPDX-License-Identifier: Apache-2.0
"""Reports what is over the size budgets: files of 400 lines, functions of 60, headers of 250."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("llm_datadist_torch", "ascend_sim", "csrc", "tests", "examples", "benchmarks", "scripts")
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".sh"}
FILE_LINES = 400
HEADER_LINES = 250
FUNCTION_LINES = 60


def long_functions(path: Path, text: str) -> Iterator[str]:
    """One line per function of a Python file that is over budget."""
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield f"{place}: {node.name}() has {lines} lines, limit {FUNCTION_LINES}"


def offenders(path: Path) -> Iterator[str]:
    """One line per budget that a file exceeds."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    limit = HEADER_LINES if path.suffix == ".h" else FILE_LINES
    if lines > limit:
        yield f"{path.relative_to(ROOT)}: {lines} lines, limit {limit}"
    if path.suffix in (".py", ".pyi"):
        yield from long_functions(path, text)


def main() -> int:
    """Prints every offender. Budgets are by idea, so one that is over is a question, no failure."""
    files = [ROOT / "setup.py"]
    for folder in FOLDERS:
        files += sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES)
    found = [line for path in files for line in offenders(path)]
    for line in found:
        print(line)
    print(f"check_budgets: {len(files)} files, {len(found)} over budget")
    return 0


if __name__ == "__main__":
    sys.exit(main())
