"""Spans against the events that they are made of, and their words against OpenTelemetry's own list of them."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import aclosing
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from moa_ray.errors import MoARayError
from moa_ray.runtime import AgentDelta, AgentFinished, RunOptions, RunSpans
from tests.commands import ROOT
from tests.runtime.panels import panel

KNOWN = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
OPERATIONS = {each.value for each in gen_ai_attributes.GenAiOperationNameValues}


class Recorded:
    """What a run's spans are, as a collector would get them."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.run = RunSpans(provider.get_tracer("test"))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def parent_of(self, span: ReadableSpan) -> str:
        ids = {each.context.span_id: each.name for each in self.spans}
        return ids[span.parent.span_id] if span.parent else ""


async def recorded(*layers: int, **options: Any) -> tuple[Recorded, list[Any]]:
    seen, events = Recorded(), []
    wishes = options.pop("wishes", None)
    run, _ = panel(*layers, **options)
    try:
        async for event in run.stream("why?", wishes or RunOptions()):
            seen.run.add(event)
            events.append(event)
    except MoARayError:
        pass
    return seen, events


async def test_every_layer_agent_and_attempt_is_a_span_below_the_one_it_belongs_to() -> None:
    seen, events = await recorded(3, 3)
    tree = Counter((seen.parent_of(span), span.name) for span in seen.spans)
    assert tree == {
        ("", "invoke_workflow panel"): 1,
        **{("invoke_workflow panel", f"layer {n}"): 1 for n in (1, 2, 3)},
        **{(f"layer {n}", f"invoke_agent a{a}"): 1 for n in (1, 2) for a in (1, 2, 3)},
        ("layer 3", "invoke_agent chief"): 1,
        **{(f"invoke_agent a{a}", "chat script"): 2 for a in (1, 2, 3)},
        ("invoke_agent chief", "chat script"): 1,
    }
    assert len({span.context.trace_id for span in seen.spans}) == 1
    ends = {(e.call, e.attempt): e for e in events if isinstance(e, AgentFinished)}
    for span in seen.named("chat script"):
        assert span.kind is SpanKind.CLIENT and span.attributes and span.start_time and span.end_time
        parent = next(s for s in seen.spans if span.parent and s.context.span_id == span.parent.span_id)
        assert parent.attributes
        end = ends[str(parent.attributes["moa_ray.call"]), int(str(span.attributes["moa_ray.attempt"]))]
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(end.seconds, abs=2e-3)
        assert span.attributes["gen_ai.usage.output_tokens"] == end.usage.completion_tokens
        assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
        assert span.attributes["gen_ai.provider.name"] == "scripted"


async def test_no_span_ends_before_what_hangs_below_it_and_all_end() -> None:
    seen, _ = await recorded(2, 2, spec={"policy": {"streaming": "staircase"}}, reply_tokens=40, itl_s=0.002)
    spans = {span.context.span_id: span for span in seen.spans}
    for span in spans.values():
        above = spans[span.parent.span_id] if span.parent else span
        assert above.start_time is not None and above.end_time is not None
        assert span.start_time is not None and span.end_time is not None
        assert above.start_time <= span.start_time <= span.end_time <= above.end_time


async def test_the_words_are_those_of_the_conventions_and_no_text_is_told() -> None:
    seen, events = await recorded(2, wishes=RunOptions(draft_flush_s=0))
    assert any(isinstance(event, AgentDelta) for event in events)
    texts = {event.text for event in events if isinstance(event, AgentFinished)}
    for span in seen.spans:
        for key, value in (span.attributes or {}).items():
            assert key in KNOWN or key.startswith("moa_ray.") or key == "error.type"
            assert not any(text in str(value) for text in texts)
        assert span.attributes and span.attributes.get("gen_ai.operation.name", "chat") in OPERATIONS


async def test_a_failed_attempt_is_told_with_its_error_and_the_call_that_then_succeeds_has_none() -> None:
    options = {"spec": {"policy": {"retries": 1}}, "faults": [{"agent": "a1", "kind": "unavailable", "times": 1}]}
    seen, _ = await recorded(1, **options)
    first, second = sorted(
        (s for s in seen.named("chat script") if seen.parent_of(s) == "invoke_agent a1"),
        key=lambda s: s.start_time or 0,
    )
    assert first.status.status_code is StatusCode.ERROR and second.status.status_code is StatusCode.UNSET
    assert first.attributes and first.attributes["error.type"] == "EngineUnavailable"
    (call,) = seen.named("invoke_agent a1")
    assert call.status.status_code is StatusCode.UNSET


async def test_a_run_that_its_caller_leaves_ends_its_spans_with_an_error() -> None:
    seen = Recorded()
    run, _ = panel(2, ttft_s=5)
    async with aclosing(run.stream("why?", RunOptions())) as events:
        async for event in events:
            seen.run.add(event)
            if event.name == "agent.started":
                break
    seen.run.close()
    seen.run.close()
    (root,) = seen.named("invoke_workflow panel")
    assert root.status.status_code is StatusCode.ERROR and root.status.description == "the caller left"
    assert len(seen.named("layer 1")) == 1


async def test_the_python_of_the_docs_makes_them() -> None:
    names: dict[str, Any] = {}
    page = (ROOT / "docs" / "observability.md").read_text()
    exec(compile(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], "observability.md", "exec"), names)
    _, events = await recorded(2)

    class Moa:
        def events(self, question: str) -> Any:
            return iter(events)

    assert list(names["answer"](Moa(), "why?")) == events


async def test_a_request_that_another_router_runs_anew_has_the_spans_of_both_runs() -> None:
    seen = Recorded()
    for _ in range(2):
        run, _ = panel(2)
        events = [event async for event in run.stream("why?", RunOptions())]
        for event in events[: len(events) if seen.spans else 4]:
            seen.run.add(event)
    assert [span.status.status_code for span in seen.named("invoke_workflow panel")] == [
        StatusCode.ERROR,
        StatusCode.UNSET,
    ]
    assert len(seen.named("invoke_agent chief")) == 1
