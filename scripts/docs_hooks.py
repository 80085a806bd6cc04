# SPDX-License-Identifier: Apache-2.0
"""What mkdocs can't do by itself: documents and sources outside docs/ are part of the site.

The documents of a checkout link to each other by paths. A link from a page to a document elsewhere
(README.md, CONTRIBUTING.md, ascend_sim/...) becomes one to a page of the site, and a link to any
other file one to a copy of it, so that all links are checked and the site works without a network.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = "source"  # where copies of files and pages of other documents go
README = "index.md"
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_PROGRAM = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def _site_path(path: Path) -> str:
    """Where a file of the checkout is in the site's sources."""
    inside = path.relative_to(ROOT).as_posix()
    if inside == "README.md":
        return README
    if inside.startswith("docs/"):
        return inside.removeprefix("docs/")
    # As text: a browser would run or save some kinds of files.
    return f"{OUTSIDE}/{inside}" if path.suffix in (".md", ".svg") else f"{OUTSIDE}/{inside}.txt"


def _targets(path: Path) -> set[Path]:
    """Files of the checkout that a document links to."""
    text = _PROGRAM.sub("", path.read_text(encoding="utf-8"))
    links = (found["target"] for found in _LINK.finditer(text))
    targets = {(path.parent / link).resolve() for link in links if "://" not in link}
    return {target for target in targets if target.is_file()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md, the documents that pages link to, theirs, and the sources they name."""
    pending = {ROOT / "README.md", *(ROOT / "docs").rglob("*.md")}
    seen: set[Path] = set()
    while pending:
        path = pending.pop()
        seen.add(path)
        if path.suffix == ".md":
            pending |= _targets(path) - seen
    for path in sorted(seen):
        name = _site_path(path)
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Let the links of a page lead to where their files are in the site."""
    source = page.file.src_uri
    outside = source.removeprefix(f"{OUTSIDE}/")
    if source == README:
        path = ROOT / "README.md"
    else:
        path = ROOT / outside if outside != source else ROOT / "docs" / source

    def moved(link: re.Match[str]) -> str:
        target = (path.parent / link["target"]).resolve()
        if "://" in link["target"] or not target.exists():
            return link[0]
        if target.is_dir():
            return link["text"]
        place = posixpath.relpath(_site_path(target), posixpath.dirname(source) or ".")
        return f"[{link['text']}]({place}{link['anchor'] or ''})"

    return _LINK.sub(moved, markdown)
