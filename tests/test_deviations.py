# SPDX-License-Identifier: Apache-2.0
"""The deviations table of docs/deviations.md: complete, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = sorted([*map(str, range(1, 54)), "16b", "33b", "33c"])
ROW = re.compile(r"^\| *([^|]+?) *\|(?:[^|\\]|\\.)*\|(?:[^|\\]|\\.)*\| *(.*?) *\|$", re.MULTILINE)


def rows() -> list[tuple[str, str]]:
    """(number or API section, test) of every row."""
    text = (ROOT / "docs" / "deviations.md").read_text(encoding="utf-8")
    return [
        row for row in ROW.findall(text) if row[0] not in ("no.", "section") and "---" not in row[0]
    ]


def test_every_defect_has_one_row():
    numbered = [key for key, _ in rows() if re.fullmatch(r"\d+[bc]?", key)]
    assert sorted(numbered) == NUMBERS


def test_every_named_test_exists():
    for key, named in rows():
        if not named:
            continue
        match = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", named)
        assert match, (key, named)
        files = list((ROOT / "tests").rglob(match[1]))
        functions = {
            node.name
            for file in files
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        }
        assert match[2] in functions, (key, named)
