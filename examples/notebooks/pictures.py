# SPDX-License-Identifier: Apache-2.0
"""Pictures of blocks for the notebooks: SVG, which needs no plotting package, in light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_COLUMNS, _WIDTH, _HEIGHT = 16, 38, 26
_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2")


class BlockMap:
    """Which block belongs to whom, as a grid: `_repr_html_` is what a notebook shows.

    Args:
        blocks: blocks in all.
        owners: name of a sequence -> its blocks; a block of several is drawn as shared.
        title: what is written above.
    """

    def __init__(self, blocks: int, owners: Mapping[str, Sequence[int]], title: str) -> None:
        self.title, self.names = title, list(owners)
        self.of_block: list[list[str]] = [[] for _ in range(blocks)]
        for name, owned in owners.items():
            for block in owned:
                self.of_block[block].append(name)

    def __repr__(self) -> str:
        used = {b: "+".join(names) for b, names in enumerate(self.of_block) if names}
        return f"{self.title}: {used}"

    def _repr_html_(self) -> str:
        rows = -(-len(self.of_block) // _COLUMNS)
        size = f'width="{_COLUMNS * _WIDTH}" height="{rows * _HEIGHT + 22}"'
        style = 'font-family="sans-serif" font-size="11"'
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>',
            f'<text x="0" y="13" fill="#888">{escape(self.title)}</text>',
        ]
        for block, names in enumerate(self.of_block):
            x, y = block % _COLUMNS * _WIDTH, block // _COLUMNS * _HEIGHT + 20
            colour = "none"
            if names:
                first = _COLOURS[self.names.index(names[0]) % len(_COLOURS)]
                colour = first if len(names) == 1 else "#9c755f"
            ink = "#fff" if names else "#888"
            label = f"{block} {'+'.join(names)}".strip()
            parts.append(
                f'<rect x="{x}" y="{y}" width="{_WIDTH - 3}" height="{_HEIGHT - 3}" rx="3"'
                f' fill="{colour}" stroke="#888"/><text x="{x + 3}" y="{y + 15}"'
                f' fill="{ink}">{escape(label)}</text>'
            )
        return "".join([*parts, "</svg>"])
