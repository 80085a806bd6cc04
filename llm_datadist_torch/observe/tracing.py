# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry spans, where its API package is installed."""

from __future__ import annotations

import importlib
import time
from typing import Any

from llm_datadist_torch.observe.transfers import TransferListener, TransferRecord
from llm_datadist_torch.values.status import LLMStatusCode, error_for

TRACER = "llm_datadist_torch"


def span_listener(cluster_id: int, tracer_provider: Any = None) -> TransferListener:  # noqa: ANN401
    """Something that makes a span of each transfer, in the context of the thread that made it.

    The span is made when the transfer has ended, with the times at which it began and ended.

    Args:
        cluster_id: Whose transfers they are.
        tracer_provider: None: OpenTelemetry's global one.

    Raises:
        LLMFeatureNotEnabledError: ``opentelemetry-api`` is not installed.
    """
    try:
        trace = importlib.import_module("opentelemetry.trace")
    except ImportError as error:
        raise error_for(
            LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            f"OpenTelemetry can't be imported: {error}",
            remedy="pip install opentelemetry-api.",
        ) from None
    tracer = trace.get_tracer(TRACER, tracer_provider=tracer_provider)

    def make_span(record: TransferRecord) -> None:
        ended_ns = time.time_ns()
        attributes = {
            "llm_datadist.cluster_id": str(cluster_id),
            "llm_datadist.peer": str(record.peer),
            "llm_datadist.path": record.path,
            "llm_datadist.bytes": record.nbytes,
        }
        span = tracer.start_span(
            f"llm_datadist.{record.operation}",
            kind=trace.SpanKind.CLIENT,
            start_time=ended_ns - record.took_ns,
            attributes=attributes,
        )
        span.end(ended_ns)

    return make_span
