# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from their first cell to their last, and their stored outputs are real."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 48 * 1024

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell has printed and returned, joined: a kernel sends what is printed in any pieces.

    Warnings of others' packages are left out.
    """
    shown = [output for output in cell.outputs if output.get("name") != "stderr"]
    return "".join(output.get("text") or output.data["text/plain"] for output in shown)


@pytest.mark.thorough
@pytest.mark.whole_programs
@every_notebook
# Third parties' own: what jupyter_client and its sockets warn of is not ours to fix.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_notebook(path: Path) -> None:
    notebook, stored = read(path), read(path)
    NotebookClient(notebook, timeout=60).execute(cwd=str(path.parent))
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    # Devices and paths are shown; what was stored on a CPU is compared with a CPU's.
    if stored.metadata.executed_on == "cpu" and not torch.accelerator.is_available():
        for new, old in zip(notebook.cells, stored.cells, strict=True):
            if new.cell_type == "code" and "varies" not in new.metadata.get("tags", []):
                assert text_of(new) == text_of(old), new.source


@pytest.mark.same_on_every_device
@every_notebook
def test_outputs_are_stored(path: Path) -> None:
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|usr|work)/", str(outputs))
    assert path.stat().st_size <= MOST_BYTES


@pytest.mark.same_on_every_device
@every_notebook
def test_texts_are_in_english_and_chinese(path: Path) -> None:
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            assert re.search("[\u4e00-\u9fff]", cell.source), cell.source
            assert re.search(r"[a-z]+ [a-z]+ [a-z]+", cell.source), cell.source
