# SPDX-License-Identifier: Apache-2.0
"""Figures as the pages show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def number(value: float | None) -> str:
    """Two or three digits that count."""
    if value is None:
        return "n/a"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.{2 if abs(value) < 10 else 1}f}"


def time_text(microseconds: float) -> str:
    """A time in µs or ms."""
    if microseconds < 1000:
        return f"{number(microseconds)} µs"
    return f"{number(microseconds / 1000)} ms"


def size_text(nbytes: float) -> str:
    """A size in its unit."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{number(nbytes)} {unit}".replace(".00", "").replace(".0 ", " ")
        nbytes /= 1024
    return f"{number(nbytes)} GiB".replace(".00", "").replace(".0 ", " ")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    every = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every) + "\n"


def machine(environment: Mapping[str, Any]) -> str:
    """Where the figures are from, and with what."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    rows = [
        ("processor", f"{environment['cpu']}, {environment['cores']} cores"),
        ("memory", size_text(environment["memory_bytes"])),
        ("kernel", environment["kernel"]),
        ("Python, torch", f"{environment['python']}, {environment['torch']}"),
        ("packages", packages),
        ("commit", environment["commit"]),
        ("when", f"{environment['time']}, load before {number(environment['load_before'])}"),
        ("command", f"`{environment['command']}`"),
    ]
    return table(("", "machine"), rows)
