"""Traces: a span a request, with the spans of its runs below it, sent to an OpenTelemetry collector."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from pydantic import AnyHttpUrl
from starlette.requests import Request

from moa_ray import __version__
from moa_ray.errors import SpecError
from moa_ray.runtime import RunSpans
from moa_ray.server.runs import Choice

_SEND_TIMEOUT_S = 2.0
"""For a batch of spans, tries included; a gateway that ends waits for its last one."""


class Tracing:
    """Where spans of requests go.

    Args:
        tracer: Whose spans they are.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @classmethod
    def to(cls, collector: AnyHttpUrl) -> Tracing:
        """Spans are sent to `collector` in batches, in a thread of their own; while it is away they are dropped.

        Further settings are OpenTelemetry's: `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_TRACES_SAMPLER`,
        `OTEL_RESOURCE_ATTRIBUTES`, in the environment of the gateway's node.

        Raises:
            SpecError: If the exporter is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise SpecError("traces need OpenTelemetry's exporter", hint="pip install 'moa-ray[otel]'") from None
        exporter = OTLPSpanExporter(f"{str(collector).rstrip('/')}/v1/traces", timeout=_SEND_TIMEOUT_S)
        resource = Resource.create({"service.name": "moa-ray", "service.version": __version__})
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider.get_tracer("moa_ray", __version__))

    def request(self, request: Request, model: str, choices: Sequence[Choice]) -> RequestTrace:
        """Begin a request's span, below the caller's own where its `traceparent` tells of one."""
        return RequestTrace(self._tracer, request, model, choices)


class RequestTrace:
    """The span of one request; its runs' hang below it."""

    def __init__(self, tracer: Tracer, request: Request, model: str, choices: Sequence[Choice]) -> None:
        path = request.scope["path"]
        self._span = tracer.start_span(
            f"{request.method} {path}",
            propagate.extract(request.headers),
            SpanKind.SERVER,
            {
                "http.request.method": request.method,
                "url.path": path,
                "gen_ai.request.model": model,
                "gen_ai.request.choice.count": len(choices),
                "moa_ray.request": request.state.request_id,
            },
        )
        for choice in choices:
            choice.followers.append(RunSpans(tracer, trace.set_span_in_context(self._span)))

    def end(self, status: int) -> None:
        """The request ended with an HTTP status, 499 where its caller left."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
