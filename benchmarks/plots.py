# SPDX-License-Identifier: Apache-2.0
"""Pictures of results: one panel for each benchmark that has an axis."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AXES = {
    "copy": ("block_bytes", "bytes of a block", "gb_per_s", "GB/s"),
    "swap": ("block_bytes", "bytes of a block", "gb_per_s", "GB/s"),
    "pull": ("block_bytes", "bytes of a block", "gb_per_s", "GB/s"),
    "push": ("block_bytes", "bytes of a block", "gb_per_s", "GB/s"),
    "hosts": ("block_bytes", "bytes of a block", "gb_per_s", "GB/s"),
    "runs": ("blocks", "runs in one pull", "us_per_unit", "µs for each run"),
    "link": ("links", "links made at once", "us_per_unit", "µs for each link"),
}
"""Benchmark -> (name and text of the axis, figure and its text)."""
STYLES = {"ours": "-", "peer": "--", "ceiling": ":"}


def digest(points: Sequence[Mapping[str, Any]]) -> str:
    """What tells one set of points from another; it is written into their picture."""
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()


def lines(name: str, points: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Contender -> its points; of a pull or push the scattered ones of many blocks."""
    axis, _, figure, _ = AXES[name]
    found: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        place = point["at"]
        if place.get("run", 1) > 1 or (name != "runs" and place.get("blocks", 2) == 1):
            continue
        for each in point["contenders"]:
            if figure in each:
                found.setdefault(each["name"], []).append((place[axis], each[figure]))
    return found


@dataclass(frozen=True)
class Panel:
    """One of the pictures that are side by side.

    Attributes:
        title: What it is of.
        x_text: What the horizontal axis shows.
        y_text: What the vertical axis shows.
        lines: Line -> its points.
        styles: Line -> how it is drawn; others are solid.
        base: Of the logarithm of the horizontal axis.
    """

    title: str
    x_text: str
    y_text: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    styles: Mapping[str, str] = field(default_factory=dict)
    base: int = 10


def panel_of(name: str, points: Sequence[Mapping[str, Any]]) -> Panel:
    """The panel of a benchmark of the command."""
    _, x_text, _, y_text = AXES[name]
    roles = {each["name"]: each["role"] for point in points for each in point["contenders"]}
    styles = {contender: STYLES[role] for contender, role in roles.items()}
    return Panel(name, x_text, y_text, lines(name, points), styles, 10 if name == "runs" else 2)


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw the benchmarks that have an axis, side by side, into a file.

    Raises:
        SystemExit: There is no matplotlib, or nothing to draw.
    """
    names = [name for name in results if name in AXES]
    if not names:
        raise SystemExit(f"bench: --plot: nothing to draw; pictures are made of {', '.join(AXES)}")
    told = " ".join(digest(results[name]) for name in names)
    draw_panels([panel_of(name, results[name]) for name in names], path, told)


def draw_panels(panels: Sequence[Panel], path: Path, told: str) -> None:
    """Draw panels side by side into a file; an SVG has ``told`` in its description.

    Raises:
        SystemExit: There is no matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        message = 'bench: no matplotlib: pip install "llm_datadist_torch[plots]"'
        raise SystemExit(message) from None
    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    figure = Figure(figsize=(6.4 * len(panels), 4.2), layout="constrained")
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for place, panel in zip(places, panels, strict=True):
        for name, points in panel.lines.items():
            xs, ys = zip(*sorted(points), strict=True)
            style = panel.styles.get(name, "-")
            place.plot(xs, ys, style, marker="o", markersize=3, label=name)
        place.set(xlabel=panel.x_text, ylabel=panel.y_text, title=panel.title, yscale="log")
        place.set_xscale("log", base=panel.base)
        place.grid(visible=True, which="major", alpha=0.3)
        place.legend(fontsize=8)
    about = {"Date": None, "Description": told}
    figure.savefig(path, metadata=about if path.suffix == ".svg" else None)
