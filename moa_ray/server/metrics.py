"""`/metrics`: what one gateway replica saw, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moa_ray.runtime import GateDecided
from moa_ray.runtime.records import Recorder
from moa_ray.server.edge import Admission
from moa_ray.server.runs import Choice

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)

_GATE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 20)


class Metrics:
    """Counters of one application, in a registry of their own.

    Args:
        admission: Whose places are told.
        recorder: Whose lost runs are told; None where runs are not recorded.
    """

    def __init__(self, admission: Admission, recorder: Recorder | None = None) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("moa_ray_requests", "Requests by outcome.", ["model", "status"], registry=registry)
        self._seconds = Histogram(
            "moa_ray_request_seconds", "Duration of a run.", ["model"], registry=registry, buckets=_SECONDS
        )
        self._ttft = Histogram(
            "moa_ray_ttft_seconds", "Time to the answer's first token.", ["model"], registry=registry, buckets=_SECONDS
        )
        self._tokens = Counter("moa_ray_tokens", "Tokens by agent.", ["model", "agent", "kind"], registry=registry)
        self._calls = Counter("moa_ray_calls", "Engine calls by end.", ["model", "agent", "state"], registry=registry)
        self._repeats = Counter(
            "moa_ray_repeats", "Retries, hedges, and attempts cut off.", ["model", "agent", "kind"], registry=registry
        )
        gate = ["model", "agent"]
        self._importance = Counter("moa_ray_gate_importance", "Sum of the gate's weights.", gate, registry=registry)
        self._load = Counter("moa_ray_gate_load", "Requests that the gate gave an agent.", gate, registry=registry)
        self._gate_s = Histogram(
            "moa_ray_gate_seconds", "Time that the gate took.", ["model"], registry=registry, buckets=_GATE_SECONDS
        )
        self._gate_failed = Counter(
            "moa_ray_gate_failures", "Requests that went without their gate.", ["model"], registry=registry
        )
        for name, help, value in (
            ("running", "Requests being answered.", lambda: admission.running),
            ("queued", "Requests that wait for a place.", lambda: admission.queued),
        ):
            Gauge(f"moa_ray_requests_{name}", help, registry=registry).set_function(value)
        if recorder:
            lost = Gauge("moa_ray_records_lost", "Runs that could not be recorded.", registry=registry)
            lost.set_function(lambda: recorder.lost)

    def add(self, model: str, status: int, choices: Sequence[Choice]) -> None:
        """Book a request that ended with an HTTP status."""
        self._requests.labels(model, str(status)).inc()
        for choice in choices:
            if choice.end is not None and not choice.end.error:
                self._seconds.labels(model).observe(choice.end.t)
                if choice.end.ttft_s is not None:
                    self._ttft.labels(model).observe(choice.end.ttft_s)
            if choice.ledger.gate is not None:
                self._add_gate(model, choice.ledger.gate)
            for record in choice.ledger.records:
                self._calls.labels(model, record.agent, record.state).inc()
                for kind in ("retries", "hedges", "cancelled"):
                    self._repeats.labels(model, record.agent, kind).inc(getattr(record, kind))
            for agent, usage in choice.ledger.usage_by_agent.items():
                self._tokens.labels(model, agent, "prompt").inc(usage.prompt_tokens)
                self._tokens.labels(model, agent, "cached").inc(usage.cached_tokens)
                self._tokens.labels(model, agent, "completion").inc(usage.completion_tokens)

    def _add_gate(self, model: str, gate: GateDecided) -> None:
        self._gate_s.labels(model).observe(gate.seconds)
        if gate.failed:
            self._gate_failed.labels(model).inc()
            return
        for agent, share in gate.shares.items():
            self._importance.labels(model, agent).inc(share)
            self._load.labels(model, agent).inc()

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
