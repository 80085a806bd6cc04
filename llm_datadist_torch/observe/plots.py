# SPDX-License-Identifier: Apache-2.0
"""Plots of a ``Stats``, by matplotlib."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from llm_datadist_torch.observe.stats import Stats
from llm_datadist_torch.values.status import LLMStatusCode, error_for


class HasStats(Protocol):
    """An ``LLMDataDist`` or a ``Node``."""

    def stats(self) -> Stats:
        """See ``LLMDataDist.stats``."""
        ...


def plot_pool(source: HasStats | Stats, ax: Any = None) -> Any:  # noqa: ANN401
    """Draw where the caches lie in their pools; without a pool, how large they are.

    Args:
        source: An instance, a node, or what its ``stats()`` returned.
        ax: matplotlib axes to draw in. None: new ones.

    Returns:
        The axes.

    Raises:
        LLMFeatureNotEnabledError: matplotlib is not installed.
    """
    stats, ax = _stats(source), _axes(ax)
    colours = importlib.import_module("matplotlib").colormaps["tab20"]
    for at, pool in enumerate(stats.pools):
        ax.barh(at, pool.total_bytes / 2**20, color="none", edgecolor="grey")
        for cache in stats.caches:
            if cache.pool != pool.name:
                continue
            for number, (offset, nbytes) in enumerate(cache.spans):
                label = _label(cache.cache_id, cache.names) if number == 0 else None
                colour = colours(cache.cache_id % 20)
                left, width = offset / 2**20, nbytes / 2**20
                ax.barh(at, width, left=left, color=colour, label=label)
    own = [cache for cache in stats.caches if not cache.pool]
    for number, cache in enumerate(own):
        colour = colours(cache.cache_id % 20)
        ax.barh(len(stats.pools) + number, cache.nbytes / 2**20, color=colour)
    names = [f"{pool.name} pool" for pool in stats.pools]
    names += [_label(cache.cache_id, cache.names) for cache in own]
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("MiB")
    ax.set_title(f"memory of cluster {stats.cluster_id}")
    if any(cache.pool for cache in stats.caches):
        ax.legend(fontsize="small")
    return ax


def plot_links(source: HasStats | Stats, ax: Any = None) -> Any:  # noqa: ANN401
    """Draw the links as a star, as wide as what they have moved, dashed where they are lost.

    Args:
        source: An instance, a node, or what its ``stats()`` returned.
        ax: matplotlib axes to draw in. None: new ones.

    Returns:
        The axes.

    Raises:
        LLMFeatureNotEnabledError: matplotlib is not installed.
    """
    import math

    stats, ax = _stats(source), _axes(ax)
    moved = bytes_by_peer(stats)
    most = max(moved.values(), default=0) or 1
    for number, link in enumerate(stats.links):
        angle = 2 * math.pi * number / len(stats.links)
        x, y = math.cos(angle), math.sin(angle)
        width = 1 + 5 * moved.get(link.peer, 0) / most
        style = "-" if link.state == "linked" else "--"
        ax.plot([0, x], [0, y], style, linewidth=width, color="tab:blue", zorder=1)
        ax.scatter([x], [y], s=300, color="tab:orange", zorder=2)
        text = f"{link.peer}\n{', '.join(sorted(set(link.transports.values())))}"
        ax.annotate(text, (1.18 * x, 1.18 * y), ha="center", va="center")
    ax.scatter([0], [0], s=500, color="tab:green", zorder=2)
    ax.annotate(str(stats.cluster_id), (0, 0), ha="center", va="center")
    ax.set_xlim(-1.5, 1.5)
    ax.set_ylim(-1.5, 1.5)
    ax.set_axis_off()
    ax.set_title(f"links of cluster {stats.cluster_id}")
    return ax


def plot_transfers(source: HasStats | Stats, ax: Any = None) -> Any:  # noqa: ANN401
    """Draw the latest transfers: when, and how fast; one colour per peer.

    Args:
        source: An instance, a node, or what its ``stats()`` returned.
        ax: matplotlib axes to draw in. None: new ones.

    Returns:
        The axes.

    Raises:
        LLMFeatureNotEnabledError: matplotlib is not installed.
    """
    stats, ax = _stats(source), _axes(ax)
    for peer in sorted({record.peer for record in stats.recent}):
        of_peer = [record for record in stats.recent if record.peer == peer]
        ago = [(record.began_ns - stats.monotonic_ns) / 1e9 for record in of_peer]
        speed = [record.nbytes / max(1, record.took_ns) for record in of_peer]
        ax.scatter(ago, speed, s=12, label=f"cluster {peer}")
    ax.set_xlabel("seconds ago")
    ax.set_ylabel("GB/s")
    ax.set_title(f"transfers of cluster {stats.cluster_id}")
    if stats.recent:
        ax.legend(fontsize="small")
    return ax


def bytes_by_peer(stats: Stats) -> dict[int, int]:
    """How many bytes went from or to each peer."""
    moved: dict[int, int] = {}
    for counter in stats.transfers:
        moved[counter.peer] = moved.get(counter.peer, 0) + counter.nbytes
    return moved


def _label(cache_id: int, names: tuple[str, ...]) -> str:
    return f"cache {cache_id}" + (f" {names[0]}" if names else "")


def _stats(source: HasStats | Stats) -> Stats:
    return source if isinstance(source, Stats) else source.stats()


def _axes(ax: Any) -> Any:  # noqa: ANN401 (matplotlib is optional)
    if ax is not None:
        return ax
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            f"matplotlib can't be imported: {error}",
            remedy="pip install matplotlib.",
        ) from None
    return pyplot.subplots(figsize=(7, 3))[1]
