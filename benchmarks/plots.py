# SPDX-License-Identifier: Apache-2.0
"""Pictures of results: one panel for each benchmark that has an axis."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw the benchmarks that have an axis, side by side, into a file.

    Raises:
        SystemExit: There is no matplotlib, or nothing to draw.
    """
    names = [name for name in results if name in AXES]
    if not names:
        raise SystemExit(f"bench: --plot: nothing to draw; pictures are made of {', '.join(AXES)}")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        message = 'bench: no matplotlib: pip install "llm_datadist_torch[plots]"'
        raise SystemExit(message) from None
    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    figure = Figure(figsize=(6.4 * len(names), 4.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _, x_text, _, y_text = AXES[name]
        roles = {each["name"]: each["role"] for p in results[name] for each in p["contenders"]}
        for contender, places in lines(name, results[name]).items():
            xs, ys = zip(*sorted(places), strict=True)
            panel.plot(xs, ys, STYLES[roles[contender]], marker="o", markersize=3, label=contender)
        panel.set(xscale="log", yscale="log", xlabel=x_text, ylabel=y_text, title=name)
        panel.set_xscale("log", base=10 if name == "runs" else 2)
        panel.grid(visible=True, which="major", alpha=0.3)
        panel.legend(fontsize=8)
    told = {"Date": None, "Description": " ".join(digest(results[name]) for name in names)}
    figure.savefig(path, metadata=told if path.suffix == ".svg" else None)
