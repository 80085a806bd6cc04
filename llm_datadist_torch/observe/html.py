# SPDX-License-Identifier: Apache-2.0
"""What notebooks show: HTML with inline SVG, without scripts, readable in light and dark themes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from llm_datadist_torch.observe.stats import CacheStats, PoolStats, Stats

_WIDTH = 560
_MAX_ROWS = 12
_CELLS = 64

# currentColor is the theme's own; the two others are readable on white and on black.
_STYLE = (
    "font-family:system-ui,sans-serif;font-size:13px;line-height:1.5;max-width:600px;"
    "border:1px solid #8888;border-radius:6px;padding:8px 12px"
)


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def speed_of(nbytes: int, took_ns: int) -> str:
    """Bytes a second, for people."""
    return f"{size(nbytes / max(1, took_ns) * 1e9)}/s"


def facts_html(title: str, facts: Sequence[tuple[str, str]]) -> str:
    """A title and a table of names and values."""
    return f'<div style="{_STYLE}"><b>{escape(title)}</b>{_table(facts)}</div>'


def stats_html(title: str, stats: Stats) -> str:
    """An instance: its memory, its links, and its latest transfers as a heat map."""
    listen = stats.listen or "nowhere"
    parts = [_table([("listens at", listen), ("device", stats.device)])]
    parts += [_pool_map(pool, stats.caches) for pool in stats.pools]
    if stats.caches:
        parts.append(_head("caches") + _caches(stats.caches))
    if stats.quarantine.leases:
        parts.append(_head(quarantine_text(stats)))
    if stats.links:
        parts.append(_head("links") + _link_graph(stats))
    if stats.recent:
        parts.append(_head("latest transfers: brighter is faster") + _heat_map(stats))
    return f'<div style="{_STYLE}"><b>{escape(title)}</b>{"".join(parts)}</div>'


def quarantine_text(stats: Stats) -> str:
    """What is kept from others because a peer may still write to it."""
    kept = stats.quarantine
    return (
        f"{size(kept.nbytes)} of {kept.caches} cache(s) are kept for {kept.leases} lease(s) of"
        " peers that can't be heard any more and may still write"
    )


def _head(text: str) -> str:
    return f'<div style="margin-top:6px;opacity:.7">{escape(text)}</div>'


def _table(rows: Iterable[Sequence[str]]) -> str:
    cell = "padding:0 12px 0 0;text-align:left;border:0;background:none"
    lines = ("".join(f'<td style="{cell}">{escape(text)}</td>' for text in row) for row in rows)
    inner = "".join(f'<tr style="background:none">{line}</tr>' for line in lines)
    return f'<table style="border-collapse:collapse;border:0;margin:2px 0">{inner}</table>'


def _caches(caches: Sequence[CacheStats]) -> str:
    rows = [
        (
            f"cache {cache.cache_id}",
            ", ".join(cache.names) or ("handle dropped" if cache.dropped else ""),
            f"{cache.tensors} x {cache.rows} {'blocks' if cache.paged else 'rows'}",
            size(cache.nbytes),
            cache.device,
            f"{cache.leases} in use" if cache.leases else "",
        )
        for cache in caches[:_MAX_ROWS]
    ]
    if len(caches) > _MAX_ROWS:
        rows.append((f"and {len(caches) - _MAX_ROWS} more", "", "", "", "", ""))
    return _table(rows)


def _svg(height: int, inside: str, label: str) -> str:
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH} {height}"'
        f' width="100%" style="max-width:{_WIDTH}px;display:block">{inside}</svg>'
    )


def _pool_map(pool: PoolStats, caches: Sequence[CacheStats]) -> str:
    scale = _WIDTH / max(1, pool.total_bytes)
    boxes = []
    for cache in caches:
        if cache.pool == pool.name:
            for offset, nbytes in cache.spans:
                at, width = offset * scale, max(0.5, nbytes * scale)
                colour, name = _colour(cache.cache_id), f"cache {cache.cache_id}"
                boxes.append(
                    f'<rect x="{at:.1f}" y="1" width="{width:.1f}" height="16" fill="{colour}">'
                    f"<title>{name}</title></rect>"
                )
    frame = (
        f'<rect x="0.5" y="0.5" width="{_WIDTH - 1}" height="17" fill="none"'
        ' stroke="currentColor" stroke-opacity="0.5"/>'
    )
    used = pool.total_bytes - pool.free_bytes
    text = f"{pool.name} pool: {size(used)} of {size(pool.total_bytes)} used"
    return _head(text) + _svg(18, "".join(boxes) + frame, text)


def _link_graph(stats: Stats) -> str:
    moved: dict[int, int] = {}
    for counter in stats.transfers:
        moved[counter.peer] = moved.get(counter.peer, 0) + counter.nbytes
    most, shown = max(moved.values(), default=0) or 1, stats.links[:_MAX_ROWS]
    parts, height = [], 24 * len(shown)
    for number, link in enumerate(shown):
        y = 24 * number + 12
        width = 1 + 5 * math.sqrt(moved.get(link.peer, 0) / most)
        dash = "" if link.state == "linked" else ' stroke-dasharray="4 4"'
        how = ", ".join(sorted({name for name in link.transports.values() if name}))
        text = f"cluster {link.peer}: {link.state}"
        if how:
            text += f" by {how}"
        if moved.get(link.peer):
            text += f", {size(moved[link.peer])}, p50 {stats.quantile_us(link.peer, 0.5):.0f} us"
        parts.append(
            f'<path d="M12 {height / 2} C60 {height / 2} 60 {y} 110 {y}" fill="none"'
            f' stroke="{_colour(2)}" stroke-width="{width:.1f}"{dash}/>'
            f'<circle cx="116" cy="{y}" r="6" fill="{_colour(3)}"/>'
            f'<text x="130" y="{y + 4}" font-size="12" fill="currentColor">{escape(text)}</text>'
        )
    parts.append(f'<circle cx="12" cy="{height / 2}" r="9" fill="{_colour(1)}"/>')
    return _svg(height, "".join(parts), f"{len(stats.links)} links")


def _heat_map(stats: Stats) -> str:
    latest = stats.recent[-_CELLS:]
    speeds = [record.nbytes / max(1, record.took_ns) for record in latest]
    fastest, width = max(speeds) or 1, _WIDTH / _CELLS
    cells = []
    for number, (record, speed) in enumerate(zip(latest, speeds, strict=True)):
        text = (
            f"{record.operation}, cluster {record.peer}, {record.path}: {size(record.nbytes)} in"
            f" {record.took_ns / 1000:.0f} us, {speed:.2f} GB/s"
        )
        cells.append(
            f'<rect x="{number * width:.1f}" y="0" width="{width - 1:.1f}" height="18"'
            f' fill="{_colour(record.peer)}" fill-opacity="{0.15 + 0.85 * speed / fastest:.2f}">'
            f"<title>{escape(text)}</title></rect>"
        )
    return _svg(18, "".join(cells), f"{len(latest)} transfers")


def _colour(number: int) -> str:
    return f"hsl({number * 137 % 360} 60% 50%)"
