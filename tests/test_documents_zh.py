# SPDX-License-Identifier: Apache-2.0
"""The pages in docs/zh/ have the structure of the English ones: what changes in one must in both.

Compared are the levels of headings, rows of tables, items of lists, code without its comments,
pictures, and which documents are linked to.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(path.name for path in (DOCS / "zh").glob("*.md"))
_CODE = re.compile(r"^(?:<!-- (.*?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_of(text: str) -> list[tuple[str, str, str]]:
    """Of each block: its tag, its language, and its lines without comments and texts."""
    return [
        (tag or "", language, re.sub(r"\s+#.*", "", code))
        for tag, language, code in _CODE.findall(text)
    ]


def structure_of(text: str) -> list[tuple[str, int, int]]:
    """Of each section: its level, its rows of tables, and its items of lists."""
    sections = re.split(r"^(#+) .*$", _CODE.sub("", text), flags=re.MULTILINE)
    return [
        (level, len(re.findall(r"^\|", body, re.MULTILINE)), len(items(body)))
        for level, body in zip(sections[1::2], sections[2::2], strict=True)
    ]


def items(body: str) -> list[str]:
    return re.findall(r"^(?:- |\d+\. )", body, re.MULTILINE)


def links_of(path: Path) -> list[str]:
    """The documents that a page links to, by the names of the English ones."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    places = [(path.parent / target).resolve() for target in targets if "://" not in target]
    for place in places:
        assert place.exists(), place
    names = [place.relative_to(DOCS.parent).as_posix() for place in places]
    return sorted({name.replace("docs/zh/", "docs/").replace(".zh.md", ".md") for name in names})


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_the_structure_of_the_english_one(name: str) -> None:
    english, chinese = DOCS / name, DOCS / "zh" / name
    texts = [path.read_text(encoding="utf-8") for path in (english, chinese)]
    assert code_of(texts[1]) == code_of(texts[0])
    assert structure_of(texts[1]) == structure_of(texts[0])
    assert links_of(chinese) == links_of(english)
    assert re.search("[\u4e00-\u9fff]", texts[1])


@pytest.mark.parametrize("name", PAGES)
def test_chinese_pages_link_to_chinese_pages(name: str) -> None:
    text = (DOCS / "zh" / name).read_text(encoding="utf-8")
    english = re.findall(r"\]\(\.\./(\w+\.md)", text)
    assert not set(english) & set(PAGES)


def test_every_how_to_has_a_chinese_page() -> None:
    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    how_to = re.search(r"  - How to:\n(.*?)^  - ", text, re.MULTILINE | re.DOTALL)
    assert how_to is not None
    pages = {*re.findall(r": (\w+\.md)$", how_to[1], re.MULTILINE), "tutorial.md", "errors.md"}
    assert pages <= set(PAGES)
