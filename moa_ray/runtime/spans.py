"""A run as OpenTelemetry spans, a consumer of its events: the run, its gate, each layer, each call, each attempt.

Names and attributes are those of OpenTelemetry's semantic conventions for generative AI (`gen_ai.*`); what they have
no word for is `moa_ray.*`. Texts are not recorded.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from moa_ray.engines.protocol import Usage
from moa_ray.runtime.events import (
    AgentCancelled,
    AgentEvent,
    AgentFailed,
    AgentFinished,
    AgentPaused,
    AgentSkipped,
    AgentStarted,
    AgentWarmed,
    Event,
    GateDecided,
    LayerStarted,
    Notice,
    RunFinished,
    RunStarted,
)

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.util.types import AttributeValue

_GONE = "the caller left"


class RunSpans:
    """The spans of one run. A span has ended when its run has, since a call may always be tried again.

    Args:
        tracer: Whose spans they are.
        parent: Where the run's span hangs; the current one where not given.
    """

    def __init__(self, tracer: trace.Tracer, parent: Context | None = None) -> None:
        self._tracer = tracer
        self._parent = parent
        self._run: Span | None = None
        self._began_ns = 0
        self._last_s = 0.0
        self._engines: dict[str, tuple[str, str]] = {}
        self._layers: dict[int, Span] = {}
        self._calls: dict[str, Span] = {}
        self._attempts: dict[tuple[str, int], Span] = {}
        self._ended_s: dict[Span, float] = {}

    def add(self, event: Event) -> None:
        """Book one event."""
        if isinstance(event, RunStarted):
            self._start(event)
        self._last_s = event.t
        match event:
            case GateDecided():
                self._gate(event)
            case LayerStarted():
                self._layers[event.layer] = self._open(
                    f"layer {event.layer}", event.t, self._run, {_LAYER: event.layer}
                )
            case Notice():
                self._note("notice", event.t, {"moa_ray.text": event.text})
            case AgentStarted():
                self._attempt(event)
            case AgentWarmed():
                started = event.t - event.seconds
                span = self._open(f"prefill {event.agent}", started, self._of_layer(event), self._of_call(event))
                span.set_attributes(_tokens(event.usage))
                span.end(self._ns(event.t))
            case AgentSkipped():
                self._note("skipped", event.t, {"moa_ray.call": event.call, "moa_ray.source": event.source})
            case AgentFinished() | AgentPaused() | AgentFailed() | AgentCancelled():
                self._attempt_ended(event)
            case RunFinished():
                self._finish(event)
            case _:
                pass

    def close(self) -> None:
        """End what is still open: the caller left, or the run broke."""
        if self._run is not None and self._run.is_recording():
            for span in (*self._attempts.values(), self._run):
                span.set_status(Status(StatusCode.ERROR, _GONE))
            self._end_all()

    # ------------------------------------------------------------------ events

    def _start(self, event: RunStarted) -> None:
        self.close()  # a router died, and another one runs the request anew
        for spans in (self._layers, self._calls, self._attempts, self._ended_s):
            spans.clear()
        self._began_ns = time.time_ns() - round(event.t * 1e9)
        self._engines = {name: (engine["kind"], engine["model"]) for name, engine in event.engines.items()}
        self._run = self._tracer.start_span(
            f"invoke_workflow {event.graph}",
            self._parent,
            attributes={
                "gen_ai.operation.name": "invoke_workflow",
                "gen_ai.workflow.name": event.graph,
                "moa_ray.run": event.run,
                "moa_ray.calls": event.calls,
            },
            start_time=self._began_ns,
        )

    def _gate(self, event: GateDecided) -> None:
        span = self._open(
            f"gate {event.kind}",
            event.t - event.seconds,
            self._run,
            {
                "moa_ray.gate.kind": event.kind,
                "moa_ray.gate.agents": list(event.shares),
                "moa_ray.gate.weights": list(event.shares.values()),
                "moa_ray.gate.note": event.note,
            },
        )
        if event.failed:
            span.set_status(Status(StatusCode.ERROR, event.failed))
        span.end(self._ns(event.t))

    def _attempt(self, event: AgentStarted) -> None:
        if event.call not in self._calls:
            attributes = {"gen_ai.operation.name": "invoke_agent", **self._of_call(event)}
            self._calls[event.call] = self._open(
                f"invoke_agent {event.agent}", event.t, self._of_layer(event), attributes
            )
        kind, model = self._engines.get(event.engine, ("", event.engine))
        attributes = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": kind,
            "gen_ai.request.model": model,
            "moa_ray.engine": event.engine,
            "moa_ray.attempt": event.attempt,
            "moa_ray.stage": event.stage,
            "moa_ray.hedge": event.hedge,
            "moa_ray.trimmed": event.trimmed,
        }
        self._attempts[event.call, event.attempt] = self._open(
            f"chat {model}", event.t, self._calls[event.call], attributes, SpanKind.CLIENT
        )

    def _attempt_ended(self, event: AgentFinished | AgentPaused | AgentFailed | AgentCancelled) -> None:
        span = self._attempts.pop((event.call, event.attempt), None)
        if span is None:  # a call may end without having started
            self._note(event.name, event.t, {"moa_ray.call": event.call})
            return
        span.set_attributes(_tokens(event.usage))
        call = self._calls[event.call]
        match event:
            case AgentFinished() | AgentPaused():
                span.set_attribute("gen_ai.response.time_to_first_chunk", event.ttft_s)
                if isinstance(event, AgentFinished):
                    span.set_attribute("gen_ai.response.finish_reasons", [event.finish_reason])
            case AgentFailed():
                _failed(span, event.error, event.message)
                if not event.will_retry:
                    _failed(call, event.error, event.message)
            case AgentCancelled():
                span.set_attribute("moa_ray.cancelled", event.reason)
        span.end(self._ns(event.t))
        self._ended_s[call] = event.t
        if layer := self._layers.get(event.layer):
            self._ended_s[layer] = event.t

    def _finish(self, event: RunFinished) -> None:
        assert self._run is not None
        self._run.set_attributes({**_tokens(event.usage), "moa_ray.source": event.source, "moa_ray.note": event.note})
        if event.ttft_s is not None:
            self._run.set_attribute("gen_ai.response.time_to_first_chunk", event.ttft_s)
        if event.error:
            _failed(self._run, event.error, event.message)
        self._end_all()

    # ------------------------------------------------------------------ spans

    def _open(
        self,
        name: str,
        started_s: float,
        parent: Span | None,
        attributes: dict[str, AttributeValue],
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Span:
        context = trace.set_span_in_context(parent) if parent else self._parent
        return self._tracer.start_span(name, context, kind, attributes, start_time=self._ns(started_s))

    def _end_all(self) -> None:
        run = [self._run] if self._run else []
        for span in (*self._attempts.values(), *self._calls.values(), *self._layers.values(), *run):
            span.end(self._ns(self._ended_s.get(span, self._last_s)))

    def _note(self, name: str, t: float, attributes: dict[str, AttributeValue]) -> None:
        if self._run is not None:
            self._run.add_event(name, attributes, self._ns(t))

    def _of_layer(self, event: AgentEvent) -> Span | None:
        return self._layers.get(event.layer, self._run)

    @staticmethod
    def _of_call(event: AgentEvent) -> dict[str, AttributeValue]:
        return {"gen_ai.agent.name": event.agent, "moa_ray.call": event.call, _LAYER: event.layer}

    def _ns(self, t: float) -> int:
        return self._began_ns + round(t * 1e9)


_LAYER = "moa_ray.layer"


def _tokens(usage: Usage) -> dict[str, AttributeValue]:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }


def _failed(span: Span, error: str, message: str) -> None:
    span.set_attribute("error.type", error)
    span.set_status(Status(StatusCode.ERROR, message))
