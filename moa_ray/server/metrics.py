"""`/metrics`: what one gateway replica saw, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moa_ray.runtime.metrics import Add, RunMetrics
from moa_ray.runtime.records import Recorder
from moa_ray.server.edge import Admission
from moa_ray.server.runs import Choice


class Metrics:
    """Metrics of one application, in a registry of their own.

    Args:
        admission: Whose places are told.
        recorder: Whose lost runs are told; None where runs are not recorded.
    """

    def __init__(self, admission: Admission, recorder: Recorder | None = None) -> None:
        self._registry = registry = CollectorRegistry()
        self._runs = RunMetrics(self)
        self._requests = self.counter("moa_ray_requests", "Requests by outcome.", ["model", "status"])
        for name, help, value in (
            ("running", "Requests being answered.", lambda: admission.running),
            ("queued", "Requests that wait for a place.", lambda: admission.queued),
        ):
            Gauge(f"moa_ray_requests_{name}", help, registry=registry).set_function(value)
        if recorder:
            lost = Gauge("moa_ray_records_lost", "Runs that could not be recorded.", registry=registry)
            lost.set_function(lambda: recorder.lost)

    def counter(self, name: str, help: str, labels: Sequence[str]) -> Add:
        """Something that only grows."""
        counter = Counter(name, help, labels, registry=self._registry)
        return _adding(counter, "inc")

    def histogram(self, name: str, help: str, labels: Sequence[str], buckets: Sequence[float]) -> Add:
        """How values are spread."""
        histogram = Histogram(name, help, labels, registry=self._registry, buckets=buckets)
        return _adding(histogram, "observe")

    def add(self, model: str, status: int, choices: Sequence[Choice]) -> None:
        """Book a request that ended with an HTTP status."""
        self._requests(1, model, str(status))
        for choice in choices:
            self._runs.add(model, choice.ledger)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


def _adding(metric: Any, method: str) -> Add:
    found: dict[tuple[str, ...], Any] = {}  # labels() costs more than the rest

    def add(value: float, *labels: str) -> None:
        if labels not in found:
            found[labels] = getattr(metric.labels(*labels), method)
        found[labels](value)

    return add
