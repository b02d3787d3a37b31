"""Traces of requests, as a collector gets them: real OTLP over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pydantic import ValidationError

from moa_ray.server import ServerSettings
from tests.conftest import until
from tests.server.local import serving

TRACE = "0af7651916cd43dd8448eb211c80319c"
ABOVE = "b7ad6b7169203331"
CALLERS = {"traceparent": f"00-{TRACE}-{ABOVE}-01"}


class Collector:
    """What a collector was sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield collector, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(5)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds; five seconds otherwise


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_trace_below_its_callers_own_span(stream: bool) -> None:
    with collecting() as (collector, url), serving(2, settings=ServerSettings(traces=url)) as served:
        assert served.ask(headers=CALLERS, stream=stream, n=2).status_code == 200
        until(lambda: bool(collector.named("POST /v1/chat/completions")))
    (request,) = collector.named("POST /v1/chat/completions")
    assert request.trace_id.hex() == TRACE and request.parent_span_id.hex() == ABOVE
    runs = collector.named("invoke_workflow panel")
    assert [run.parent_span_id for run in runs] == [request.span_id] * 2
    assert len(collector.named("invoke_agent a1")) == 2 and len(collector.named("chat script")) == 6
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert collector.services == {"moa-ray"}


def test_a_request_that_fails_says_so_in_its_trace() -> None:
    faults = [{"agent": "chief"}]
    with (
        collecting() as (collector, url),
        serving(2, settings=ServerSettings(traces=url), faults=faults) as served,
    ):
        assert served.ask(headers=CALLERS).status_code == 503
        until(lambda: bool(collector.named("POST /v1/chat/completions")))
    (request,) = collector.named("POST /v1/chat/completions")
    assert {a.key: a.value.int_value for a in request.attributes}["http.response.status_code"] == 503
    (run,) = collector.named("invoke_workflow panel")
    assert run.status.code == 2 and run.status.message


def test_a_collector_that_is_away_costs_no_request() -> None:
    with serving(2, settings=ServerSettings(traces="http://127.0.0.1:9")) as served:
        assert [served.ask(headers=CALLERS).status_code for _ in range(3)] == [200] * 3


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="traces"):
        ServerSettings(traces="collector")
