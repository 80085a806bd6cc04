# SPDX-License-Identifier: Apache-2.0
"""``top``: what a remote instance does, live. It needs ``rich``."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from llm_datadist_torch.cli.remote import connect, look_at
from llm_datadist_torch.observe.html import quarantine_text, size
from llm_datadist_torch.observe.stats import Stats
from llm_datadist_torch.values.status import LLMException

if TYPE_CHECKING:
    from rich.console import RenderableType


def run(address: str, interval_s: float, count: int | None) -> int:
    """Show the instance at an address until Ctrl-C, or ``count`` times.

    Returns:
        The exit status: 2 without ``rich``, 1 if the instance can't be reached or is lost.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        sys.stderr.write("top needs the package rich: pip install rich\n")
        return 2
    try:
        node, peer = connect(address)
    except LLMException as error:
        sys.stderr.write(f"{error}\n")
        return 1
    console = Console()
    before: Stats | None = None
    try:
        with node, Live(console=console, auto_refresh=False) as live:
            while count is None or count > 0:
                stats = look_at(node, peer)
                live.update(render(stats, before), refresh=True)
                before, count = stats, None if count is None else count - 1
                if count != 0:
                    time.sleep(interval_s)
    except KeyboardInterrupt:
        return 0
    except LLMException as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def render(stats: Stats, before: Stats | None) -> RenderableType:
    """The tables of one look; rates are since the look before."""
    from rich.console import Group
    from rich.table import Table

    seconds = 0.0 if before is None else (stats.monotonic_ns - before.monotonic_ns) / 1e9
    title = f"cluster {stats.cluster_id} at {stats.listen} on {stats.device}"
    links = Table(title=title, title_justify="left", expand=True)
    columns = ("peer", "state", "transports", "B/s", "transfers/s", "p50 us", "p99 us", "errors")
    for name in columns:
        links.add_column(name, justify="left" if name in columns[:3] else "right")
    for link in stats.links:
        nbytes, number = _moved(stats, link.peer)
        old_bytes, old_number = (0, 0) if before is None else _moved(before, link.peer)
        errors = sum(error.count for error in stats.errors if error.peer == link.peer)
        rate = f"{size((nbytes - old_bytes) / seconds)}/s" if seconds else "-"
        often = f"{(number - old_number) / seconds:.1f}" if seconds else "-"
        how = ", ".join(f"{kind}: {name}" for kind, name in link.transports.items() if name)
        quantiles = [f"{stats.quantile_us(link.peer, share):.0f}" for share in (0.5, 0.99)]
        links.add_row(str(link.peer), link.state, how, rate, often, *quantiles, str(errors))
    caches = Table(expand=True)
    for name in ("cache", "keys", "tensors", "size", "device", "leases"):
        caches.add_column(name)
    for cache in stats.caches:
        shape = f"{cache.tensors} x {cache.rows} {'blocks' if cache.paged else 'rows'}"
        keys = ", ".join(cache.names)
        row = str(cache.cache_id), keys, shape, size(cache.nbytes), cache.device, str(cache.leases)
        caches.add_row(*row)
    pools = [
        f"{pool.name} pool: {size(pool.total_bytes - pool.free_bytes)} of"
        f" {size(pool.total_bytes)} used"
        for pool in stats.pools
    ]
    kept = [quarantine_text(stats)] if stats.quarantine.leases else []
    return Group(links, caches, *pools, *kept)


def _moved(stats: Stats, peer: int) -> tuple[int, int]:
    of_peer = [counter for counter in stats.transfers if counter.peer == peer]
    return sum(each.nbytes for each in of_peer), sum(each.count for each in of_peer)
