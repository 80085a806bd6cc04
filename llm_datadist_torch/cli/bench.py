# SPDX-License-Identifier: Apache-2.0
"""``bench``: starts the benchmarks, which are beside the package or, in a wheel, inside it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "shipped", _PACKAGE.parent)
"""Folders that may have the package ``benchmarks``: that of a wheel, and that of a source tree."""


def run(prog: str, arguments: Sequence[str]) -> int:
    """Measure what the arguments say; returns the exit status."""
    for place in _PLACES:
        if (place / "benchmarks" / "command.py").is_file():
            # The processes that are measured take this path over.
            sys.path.insert(0, str(place))
            return int(importlib.import_module("benchmarks.command").main(prog, arguments))
    sys.stderr.write(f"{prog}: this installation has no benchmarks; a wheel and the sources have\n")
    return 2
