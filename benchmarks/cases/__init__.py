# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the command, each a function that measures the points of its sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measuring import Effort
from benchmarks.peers import Peer

Show = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """What is asked of a benchmark.

    Attributes:
        peers: Peers to compare with, those of this library among them.
        sweep: Points of its axis; empty for its own choice.
        effort: How long to measure each.
        tiny: Whether it is only to be seen to work.
        show: Called with each point as soon as it is there.
    """

    peers: Sequence[Peer]
    sweep: Sequence[int]
    effort: Effort
    tiny: bool
    show: Show = field(default=lambda _: None)


Benchmark = Callable[[Plan], list[dict[str, Any]]]


class NotHereError(Exception):
    """A benchmark can't be measured on this machine; the text says why, and what to do."""


def benchmarks() -> dict[str, Benchmark]:
    """All of them by name, in the order in which they run."""
    from benchmarks.cases import allocation, apart, copies, layers, linking, transfers

    return {
        "copy": copies.copy,
        "swap": copies.swap,
        "pull": transfers.pull,
        "push": transfers.push,
        "runs": transfers.runs,
        "hosts": apart.hosts,
        "latency": apart.latency,
        "link": linking.link,
        "alloc": allocation.alloc,
        "layerwise": layers.layerwise,
    }
