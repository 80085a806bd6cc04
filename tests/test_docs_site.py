# SPDX-License-Identifier: Apache-2.0
"""The documentation site is whole: each page is in it, and each public name in the reference."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import llm_datadist_torch as ld

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def pages(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in pages(entry)]


def test_every_page_is_in_the_navigation():
    docs = ROOT / "docs"
    found = [*docs.glob("*.md"), *docs.glob("zh/*.md")]
    expected = {path.relative_to(docs).as_posix() for path in found} | {"index.md"}
    assert sorted(set(pages(CONFIG["nav"])) - {"source/README.zh.md"}) == sorted(expected)


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: llm_datadist_torch\.public\.(\w+)$", text, flags=re.MULTILINE)
    # `open` is left out of __all__, so that `import *` hides no builtin.
    assert sorted(listed) == sorted({*ld.__all__, "open"})


def test_nothing_is_fetched_from_elsewhere():
    assert CONFIG["theme"]["font"] is False
    assert CONFIG["strict"] is True
    assert not {"extra_css", "extra_javascript"} & set(CONFIG)


def test_warnings_are_errors():
    """With --quiet mkdocs counts no warnings, so that --strict finds none."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (command,) = re.findall(r"-m mkdocs (.*)", makefile)
    assert command.split() == ["build", "--strict"]
