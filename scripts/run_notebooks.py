# SPDX-License-Identifier: Apache-2.0
"""Runs notebooks and stores their outputs: ``python scripts/run_notebooks.py NOTEBOOK ...``.

Warnings of other packages, and what would differ in each run of the kernel, are left out.
examples/notebooks/04_two_npus.ipynb is stored as simulated NPUs run it, the others as a CPU does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

_OURS = "SIMULATED"
_NOT_OURS = "ASCEND_HOME_PATH"


def _kept(output: nbformat.NotebookNode) -> bool:
    """Take others' lines out of an output; whether anything is left of it."""
    if output.output_type != "stream":
        return True
    lines = [line for line in output.text.splitlines(keepends=True) if _NOT_OURS not in line]
    if output.name == "stderr":
        lines = [line for line in lines if line.startswith(_OURS)]
    output.text = "".join(lines)
    return bool(lines)


def run(path: Path) -> None:
    """Run one notebook, and write it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300).execute(cwd=str(path.parent))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _kept(output)]
    notebook.metadata.language_info = {"name": "python"}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    """Run those that are named."""
    for name in sys.argv[1:]:
        run(Path(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
