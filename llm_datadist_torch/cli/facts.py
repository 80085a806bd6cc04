# SPDX-License-Identifier: Apache-2.0
"""``--version``: the version, and what the compiled part was built of. Imports no torch."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import llm_datadist_torch


class ShowVersion(argparse.Action):
    """Prints the version and the facts of the build, and ends the program."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002 (argparse's signature)
        values: str | Sequence[object] | None,  # noqa: ARG002
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """Called when the option is met."""
        sys.stdout.write(text())
        parser.exit()


def text() -> str:
    """One fact a line, the version first."""
    facts = {"installed": str(Path(llm_datadist_torch.__file__).parent), "wheel": _wheel_tag()}
    facts |= _build_facts()
    lines = [f"llm_datadist_torch {llm_datadist_torch.__version__}"]
    lines += [f"  {name}: {fact}" for name, fact in facts.items() if fact]
    return "\n".join(lines) + "\n"


def _wheel_tag() -> str:
    """The tag of the wheel that was installed; "" where there is none."""
    try:
        wheel = metadata.distribution("llm_datadist_torch").read_text("WHEEL") or ""
    except metadata.PackageNotFoundError:
        return ""
    return ", ".join(line[5:] for line in wheel.splitlines() if line.startswith("Tag: "))


def _build_facts() -> dict[str, str]:
    try:
        extension = importlib.import_module("llm_datadist_torch._C")
    except ImportError as error:
        return {"compiled part": f"can't be loaded: {error}"}
    return {name: fact for name, fact in extension.build_facts() if name != "version"}
