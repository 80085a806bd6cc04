# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics, through ``prometheus_client``. Nothing is exported before one asks for it.

Everything is computed when Prometheus scrapes: transfers pay nothing for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from llm_datadist_torch.observe.stats import Stats
from llm_datadist_torch.observe.transfers import NUM_BUCKETS
from llm_datadist_torch.values.status import LLMStatusCode, error_for

PREFIX = "llm_datadist_"
_TRANSFER = ("cluster_id", "peer", "operation", "path")

METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "transfers_total": ("counter", "Transfers that moved their bytes.", _TRANSFER),
    "transfer_bytes_total": ("counter", "Bytes that transfers moved.", _TRANSFER),
    "transfer_errors_total": (
        "counter",
        "Transfers that failed.",
        ("cluster_id", "peer", "operation", "status"),
    ),
    "transfer_seconds": ("histogram", "How long transfers took.", _TRANSFER),
    "link_up": ("gauge", "1 for a link that is up, 0 for a lost one.", ("cluster_id", "peer")),
    "caches": ("gauge", "Caches that are alive.", ("cluster_id",)),
    "cache_bytes": ("gauge", "Bytes of all caches.", ("cluster_id", "device")),
    "leases": ("gauge", "Uses of caches that are under way.", ("cluster_id",)),
    "quarantined_leases": (
        "gauge",
        "Write leases of peers that can't be heard any more and live.",
        ("cluster_id",),
    ),
    "quarantined_bytes": ("gauge", "Bytes of the caches that those are on.", ("cluster_id",)),
    "pool_bytes": ("gauge", "Size of a pool.", ("cluster_id", "pool")),
    "pool_free_bytes": ("gauge", "Free bytes of a pool.", ("cluster_id", "pool")),
}
"""Name without prefix -> kind, help, labels."""


class StatsCollector:
    """A collector for a ``prometheus_client`` registry.

    Args:
        stats: Returns what is to be exported; None when there is nothing any more.
    """

    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self._stats = stats
        self._core = _client("prometheus_client.core")

    def describe(self) -> list[Any]:
        """Nothing: a registry would collect, to know the names."""
        return []

    def collect(self) -> Iterator[Any]:
        """The metric families as they are now."""
        stats = self._stats()
        if stats is None:
            return
        families = {name: self._family(name) for name in METRICS}
        me = str(stats.cluster_id)
        for counter in stats.transfers:
            labels = [me, str(counter.peer), counter.operation, counter.path]
            families["transfers_total"].add_metric(labels, counter.count)
            families["transfer_bytes_total"].add_metric(labels, counter.nbytes)
            buckets = _cumulative(counter.buckets)
            families["transfer_seconds"].add_metric(labels, buckets, counter.seconds)
        for error in stats.errors:
            labels = [me, str(error.peer), error.operation, error.status]
            families["transfer_errors_total"].add_metric(labels, error.count)
        for link in stats.links:
            families["link_up"].add_metric([me, str(link.peer)], float(link.state == "linked"))
        families["caches"].add_metric([me], len(stats.caches))
        families["leases"].add_metric([me], sum(cache.leases for cache in stats.caches))
        for device in sorted({cache.device for cache in stats.caches}):
            nbytes = sum(cache.nbytes for cache in stats.caches if cache.device == device)
            families["cache_bytes"].add_metric([me, device], nbytes)
        families["quarantined_leases"].add_metric([me], stats.quarantine.leases)
        families["quarantined_bytes"].add_metric([me], stats.quarantine.nbytes)
        for pool in stats.pools:
            families["pool_bytes"].add_metric([me, pool.name], pool.total_bytes)
            families["pool_free_bytes"].add_metric([me, pool.name], pool.free_bytes)
        yield from families.values()

    def _family(self, name: str) -> Any:  # noqa: ANN401 (prometheus_client is optional)
        kind, text, labels = METRICS[name]
        kinds = {
            "counter": self._core.CounterMetricFamily,
            "gauge": self._core.GaugeMetricFamily,
            "histogram": self._core.HistogramMetricFamily,
        }
        return kinds[kind](PREFIX + name, text, labels=labels)


def export(stats: Callable[[], Stats | None], registry: Any = None) -> Any:  # noqa: ANN401
    """Register a collector; returns what ``registry.unregister`` takes back.

    Args:
        stats: Returns what is to be exported; None when there is nothing any more.
        registry: A ``CollectorRegistry``. None: ``prometheus_client``'s own.

    Raises:
        LLMFeatureNotEnabledError: ``prometheus_client`` is not installed.
    """
    chosen = _client("prometheus_client").REGISTRY if registry is None else registry
    collector = StatsCollector(stats)
    chosen.register(collector)
    return collector


def _cumulative(buckets: tuple[int, ...]) -> list[tuple[str, int]]:
    """Bucket k is for less than 2**k microseconds; Prometheus wants running sums, in seconds."""
    total, found = 0, []
    for number, count in enumerate(buckets):
        total += count
        last = number == NUM_BUCKETS - 1
        found.append(("+Inf" if last else repr((1 << number) / 1e6), total))
    return found


def _client(module: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            f"prometheus_client can't be imported: {error}",
            remedy="pip install prometheus_client.",
        ) from None
