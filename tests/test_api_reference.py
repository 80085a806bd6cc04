# SPDX-License-Identifier: Apache-2.0
"""Every section of the reference API that this project cites is in docs/api_reference.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "api_reference.md").read_text()
SECTIONS = set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?)\.? ", REFERENCE, re.MULTILINE))
DEFECTS = set(
    re.findall(r"^(\d+b?c?)\. ", REFERENCE.split("## 14.")[1].split("## Appendix")[0], re.MULTILINE)
)
CITED_SECTION = re.compile(r"(?:reference API,? (?:section )?|\| API )(\d+(?:\.\d+)?)")
CITED_DEFECT = re.compile(r"section 14, (\d+b?c?)")
SUFFIXES = (".py", ".md", ".cpp", ".h")


def citing_files() -> list[Path]:
    """The files of the project that may cite the reference API."""
    roots = ("llm_datadist_torch", "csrc", "tests", "docs", "examples", "benchmarks")
    found = [path for root in roots for path in (ROOT / root).rglob("*") if path.suffix in SUFFIXES]
    return [path for path in found if path.name not in ("api_reference.md", Path(__file__).name)]


@pytest.mark.parametrize(
    ("pattern", "known"),
    [(CITED_SECTION, SECTIONS), (CITED_DEFECT, DEFECTS)],
    ids=["section", "14"],
)
def test_what_is_cited_exists(pattern: re.Pattern[str], known: set[str]) -> None:
    cited = {
        (number, str(path.relative_to(ROOT)))
        for path in citing_files()
        for number in pattern.findall(path.read_text())
    }
    assert len(cited) > 5
    missing = sorted(f"{path} cites {number}" for number, path in cited if number not in known)
    assert not missing, missing
