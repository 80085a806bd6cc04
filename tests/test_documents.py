# SPDX-License-Identifier: Apache-2.0
"""Every `python` and `bash` block of the documents is run, or says why it is not.

A block that is not run has a line before it: ``<!-- not run (TAG): the reason -->``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TAGS = {
    "minutes": "it installs, compiles, or runs for minutes",
    "npu": "it needs NPUs, or torch_npu on simulated ones",
    "service": "it needs servers, other hosts, or containers",
}
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "README.zh.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "ascend_sim" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
_BLOCK = re.compile(
    r"(?:^<!-- not run \((?P<tag>\w+)\): (?P<reason>[^\n]+) -->\n)?"
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block of code of a document."""

    place: str
    language: str
    code: str
    tag: str | None
    reason: str | None


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        place = f"{path.relative_to(ROOT)}:{line}"
        found.append(Block(place, match["language"], match["code"], match["tag"], match["reason"]))
    return found


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=b.place) for b in BLOCKS if b.tag is None and b.code.strip()]
)
def test_a_block_runs(block: Block, tmp_path: Path):
    command = {
        "python": [sys.executable, "-W", "error::ResourceWarning", "-c", block.code],
        "bash": ["bash", "-euo", "pipefail", "-c", block.code],
    }[block.language]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_no_block_is_missed():
    fences = [
        (path.name, line)
        for path in DOCUMENTS
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*(```|~~~)\s*(python|bash|sh|shell|console|py)\b", line)
    ]
    assert len(fences) == len(BLOCKS), "start a block of python or bash at a line's beginning"


def test_what_is_not_run_has_a_known_tag_and_a_reason():
    for block in BLOCKS:
        assert block.tag is None or (block.tag in TAGS and block.reason), block.place
    comments = [
        place
        for path in DOCUMENTS
        for place in re.finditer("^<!-- not run", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(comments) == sum(block.tag is not None for block in BLOCKS), (
        "a tag belongs to no block"
    )


def test_every_tag_is_used():
    """So that the list says what is true."""
    assert {block.tag for block in BLOCKS if block.tag} == set(TAGS)
