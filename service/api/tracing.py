"""OpenTelemetry traces, where the settings name a collector; otherwise nothing here is imported.

A request is a span (the caller's `traceparent` is its parent), and a prediction has two more below
it: the wait in the queue and the batches that held its rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from service import __version__
from service.serving import Timing

if TYPE_CHECKING:
    from fastapi import FastAPI

_NANOSECONDS = 1_000_000_000
_UNTRACED = "health,metrics,static"
_tracer: Any = None


def install(app: FastAPI, endpoint: str) -> Callable[[], None]:
    """Send a span of every request to the OTLP collector at `endpoint` (HTTP, protobuf).

    Returns what ends it, sending what is left. Raises ImportError where they are not installed.
    """
    global _tracer
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": "foldserve", "service.version": __version__})
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("foldserve", __version__)
    app.add_middleware(
        OpenTelemetryMiddleware,
        tracer_provider=provider,
        excluded_urls=_UNTRACED,
        exclude_spans=["receive", "send"],
    )
    return provider.shutdown


def predicted(timing: Timing) -> None:
    """Record where the time of a prediction that has just ended went."""
    if _tracer is None:
        return
    end = time.time_ns()
    computed = end - int(timing.compute_seconds * _NANOSECONDS)
    arrived = computed - int(timing.queue_seconds * _NANOSECONDS)
    _tracer.start_span("queue", start_time=arrived).end(computed)
    facts = {"foldserve.batch_rows": timing.batch_rows, "foldserve.batches": timing.batches}
    _tracer.start_span("compute", start_time=computed, attributes=facts).end(end)
