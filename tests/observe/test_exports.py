# SPDX-License-Identifier: Apache-2.0
"""Metrics, spans, profiler ranges and plots: by the packages that they are for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import llm_datadist_torch as ld
from llm_datadist_torch.observe import metrics, plots, tracing
from tests.observe.conftest import BLOCK_BYTES

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana.json"


@pytest.mark.needs_prometheus
def test_metrics(linked):
    import prometheus_client

    _, node, cache, peer = linked
    registry = prometheus_client.CollectorRegistry()
    node.datadist.export_metrics(registry)
    peer.pull("kv", cache, [1, 2])
    with pytest.raises(ld.LLMCacheNotFoundError):
        peer.pull("other", cache)
    labels = {"cluster_id": "2", "peer": "1", "operation": "pull_blocks"}
    path = {"path": node.stats().transfers[0].path}

    def value(name: str, **more: str) -> float | None:
        return registry.get_sample_value(f"llm_datadist_{name}", more)

    assert value("transfers_total", **labels, **path) == 1
    assert value("transfer_bytes_total", **labels, **path) == 2 * BLOCK_BYTES
    assert value("transfer_seconds_count", **labels, **path) == 1
    assert value("transfer_seconds_bucket", **labels, **path, le="+Inf") == 1
    assert value("transfer_errors_total", **labels, status="LLM_KV_CACHE_NOT_EXIST") == 1
    assert value("link_up", cluster_id="2", peer="1") == 1
    assert value("caches", cluster_id="2") == 1
    assert value("cache_bytes", cluster_id="2", device=str(node.device)) == cache.nbytes
    exported = {family.name for family in registry.collect()}
    names = {metrics.PREFIX + name.removesuffix("_total") for name in metrics.METRICS}
    assert exported == names
    text = prometheus_client.generate_latest(registry).decode()
    assert "# TYPE llm_datadist_transfer_seconds histogram" in text
    node.close()
    assert list(registry.collect()) == []


def test_the_dashboard_uses_metrics_that_exist():
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert queries
    known = set()
    for name, (kind, _, _) in metrics.METRICS.items():
        ends = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
        known |= {metrics.PREFIX + name + end for end in ends}
    used = {name for query in queries for name in re.findall(r"llm_datadist_\w+", query)}
    assert used <= known
    labels = {label for query in queries for label in re.findall(r"by \(([^)]*)\)", query)}
    everything = {label for _, _, names in metrics.METRICS.values() for label in names} | {"le"}
    assert {each.strip() for label in labels for each in label.split(",")} <= everything


@pytest.mark.needs_opentelemetry
def test_spans(linked):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    _, node, cache, peer = linked
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    node.datadist.trace_transfers(provider)
    with provider.get_tracer("test").start_as_current_span("request") as request:
        peer.pull("kv", cache, [1, 2])
    pull, _ = exporter.get_finished_spans()
    assert pull.name == "llm_datadist.pull_blocks"
    assert pull.parent.span_id == request.get_span_context().span_id
    assert pull.attributes["llm_datadist.bytes"] == 2 * BLOCK_BYTES
    assert 0 < pull.end_time - pull.start_time < 60e9


def test_profiler_ranges(linked):
    _, _, cache, peer = linked
    peer.pull("kv", cache)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        peer.pull("kv", cache)
    names = [event.name for event in profile.events()]
    assert names.count("llm_datadist_torch::pull_blocks") == 1


@pytest.mark.needs_matplotlib
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_plots(linked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MPLBACKEND", "agg")
    _, node, cache, peer = linked
    for plot in (ld.plot_pool, ld.plot_links, ld.plot_transfers):
        plot(node)
    peer.pull("kv", cache)
    for plot, words in (
        (ld.plot_pool, "memory of cluster 2"),
        (ld.plot_links, "links of cluster 2"),
        (ld.plot_transfers, "transfers of cluster 2"),
    ):
        axes = plot(node.stats())
        assert axes.get_title() == words
        axes.figure.savefig(tmp_path / "plot.png")
        assert plot(node.datadist, axes) is axes


@pytest.mark.parametrize(
    ("module", "call", "package"),
    [
        (metrics, lambda node: node.datadist.export_metrics(), "prometheus_client"),
        (tracing, lambda node: node.datadist.trace_transfers(), "opentelemetry-api"),
        (plots, lambda node: ld.plot_pool(node), "matplotlib"),
    ],
)
def test_without_the_package(module, call, package, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with ld.open() as node, pytest.raises(ld.LLMFeatureNotEnabledError, match=package):
        call(node)
