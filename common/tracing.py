"""OpenTelemetry traces across services; nothing is recorded unless an endpoint is set.

The stages of a request are separate spans: `queue`, `lookup`, `ssd_read`, `transfer`, `prefill`,
`handoff`, `first_token`, under `request` (router), `decode` and `prefill_run`. The W3C `traceparent`
travels in the messages.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_propagator = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("penstock")


def setup(service: str, instance: str, endpoint: str) -> None:
    """Exports spans to an OTLP/gRPC collector. An empty endpoint leaves tracing off."""
    if not endpoint:
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": f"penstock-{service}", "service.instance.id": instance})
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"), timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    trace.set_tracer_provider(provider)


def shutdown() -> None:
    """Sends what is left, within the exporter's own deadline."""
    provider = trace.get_tracer_provider()
    stop = getattr(provider, "shutdown", None)
    if stop is not None:
        stop()


@contextmanager
def span(name: str, parent: str = "", kind: SpanKind = SpanKind.INTERNAL, **attributes: Any) -> Iterator[Span]:
    """A span around a block of code; `parent` is a traceparent from a message, else the current span."""
    context = _propagator.extract({"traceparent": parent}) if parent else None
    with _tracer.start_as_current_span(name, context=context, kind=kind, attributes=attributes) as current:
        yield current


def begin(name: str, parent: str = "", **attributes: Any) -> tuple[Span, str]:
    """A span that is ended by hand and is nobody's current one, with its traceparent: for work that spans tasks."""
    context = _propagator.extract({"traceparent": parent}) if parent else None
    current = _tracer.start_span(name, context=context, attributes=attributes)
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(current))
    return current, carrier.get("traceparent", "")


def record(name: str, seconds: float, parent: str, **attributes: Any) -> None:
    """A span that ends now and began `seconds` ago: for stages measured elsewhere."""
    if not parent:
        return
    end_ns = time.time_ns()
    context = _propagator.extract({"traceparent": parent})
    current = _tracer.start_span(name, context=context, attributes=attributes, start_time=end_ns - int(seconds * 1e9))
    current.end(end_ns)


def traceparent() -> str:
    """The current span's traceparent, or empty when nothing is recorded."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent", "")


def from_headers(headers: Mapping[str, str]) -> str:
    return headers.get("traceparent", "")
