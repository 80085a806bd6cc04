# SPDX-License-Identifier: Apache-2.0
"""The README's claims that a machine can check: its example runs, its files and targets exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = ["README.md", "README.zh.md"]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READMES)
def test_the_example_runs(name):
    (code,) = re.findall(r"```python\n(.*?)```", text_of(name), flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_example_is_short_and_comes_early():
    lines = text_of("README.md").splitlines()
    start = lines.index("```python")
    assert start < 40
    code = [line for line in lines[start + 1 : lines.index("```", start)] if line.strip()]
    assert len(code) <= 10


def test_both_languages_show_the_same_code():
    def code(name: str) -> list[str]:
        blocks = re.findall(r"```\w+\n(.*?)```", text_of(name), flags=re.DOTALL)
        return [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]

    assert code("README.md") == code("README.zh.md")


def shape(name: str) -> list[tuple[str, int, list[str]]]:
    """What both languages have in common: of each section level, rows of tables, and links."""
    sections = re.split(r"^(#+) .*$", text_of(name), flags=re.MULTILINE)
    found = []
    for level, body in zip(sections[1::2], sections[2::2], strict=True):
        rows = sum(line.startswith("|") for line in body.splitlines())
        links = (link.replace("docs/zh/", "docs/") for link in re.findall(r"\]\(([^)]+)\)", body))
        targets = set(links) - set(READMES)
        found.append((level, rows, sorted(targets)))
    return found


def test_both_languages_have_the_same_structure():
    assert shape("README.zh.md") == shape("README.md")


def test_pictures_are_light_and_dark():
    pictures = re.findall(r"!\[[^\]]+\]\((\S+\.svg)\)", text_of("README.md"))
    assert pictures
    for picture in pictures:
        assert "prefers-color-scheme: dark" in text_of(picture)


@pytest.mark.parametrize(
    "name",
    [*READMES, "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))],
)
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md"])
def test_make_targets_exist(name):
    known = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text_of(name), flags=re.MULTILINE)) <= known
