# SPDX-License-Identifier: Apache-2.0
"""What the connector counts, in vLLM's log and among its Prometheus metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

from llm_datadist_torch.vllm import observing
from llm_datadist_torch.vllm.foreign import VllmObject

_PREFIX = "vllm:llm_datadist_"
_BUCKETS = {
    observing.SECONDS: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0],
    observing.BYTES: [4.0**power for power in range(7, 18)],
}


@dataclass
class ConnectorStats(KVConnectorStats):
    """What all workers have counted since the last time."""

    def __post_init__(self) -> None:
        """Count from nothing unless something is given."""
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Count from nothing."""
        self.data = observing.empty()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Both together."""
        return ConnectorStats(data=observing.merged(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """For the log."""
        return observing.reduced(self.data)

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return observing.is_empty(self.data)


class ConnectorMetrics(KVConnectorPromMetrics):
    """The same, as Prometheus metrics."""

    def __init__(self, *args: VllmObject, **kwargs: VllmObject) -> None:
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, Any] = {}
        for name in observing.LISTS:
            made = self._histogram_cls(
                name=_PREFIX + name,
                documentation=observing.HELP[name],
                buckets=_BUCKETS[name],
                labelnames=self._labelnames,
            )
            self._metrics[name] = create_metric_per_engine(made, self.per_engine_labelvalues)
        for name in observing.COUNTS:
            made = self._counter_cls(
                name=_PREFIX + name,
                documentation=observing.HELP[name],
                labelnames=self._labelnames,
            )
            self._metrics[name] = create_metric_per_engine(made, self.per_engine_labelvalues)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what was counted."""
        for name in observing.LISTS:
            for each in transfer_stats_data.get(name, ()):
                self._metrics[name][engine_idx].observe(each)
        for name in observing.COUNTS:
            number = transfer_stats_data.get(name, 0)
            if number:
                self._metrics[name][engine_idx].inc(number)
