from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from moa_ray.engines import Usage
from moa_ray.runtime import AgentFinished, AgentWarmed, RunResult, Timeline
from moa_ray.runtime.timeline import Span
from tests.runtime.panels import panel
from tests.runtime.virtual import simulate

HEAD = ("run-1", 10.0, "answer", "chief", "smol", 2, 1)


def _run(*layers: int, **options: Any) -> RunResult:
    spec = options.pop("spec", {})
    run, _ = panel(*layers, spec=spec, **{"ttft_s": 0.2, "itl_s": 0.01, "reply_tokens": 100, **options})
    return simulate(run.run("why?"))


def test_a_call_waits_reads_its_prompt_and_writes() -> None:
    timeline = Timeline([AgentFinished(*HEAD, "text", Usage(), 4.0, 3.0, "stop", 1.0)])
    (row,) = timeline.rows
    assert row.spans == [Span("queue", 6.0, 8.0), Span("prefill", 8.0, 9.0), Span("decode", 9.0, 10.0)]


def test_where_an_engine_does_not_tell_the_wait_from_the_prefill_they_are_one() -> None:
    (row,) = Timeline([AgentFinished(*HEAD, "text", Usage(), 4.0, 3.0, "stop")]).rows
    assert row.spans == [Span("prefill", 6.0, 9.0), Span("decode", 9.0, 10.0)]


def test_a_warm_up_belongs_to_the_call_to_come() -> None:
    (row,) = Timeline([AgentWarmed(*HEAD, 2.0, Usage())]).rows
    assert (row.call, row.spans) == ("answer", [Span("warm-up", 8.0, 10.0)])


def test_calls_that_wait_for_a_place_show_a_queue() -> None:
    rows = Timeline(_run(2, concurrency=1).trace).rows
    kinds = {row.call: [span.kind for span in row.spans] for row in rows}
    assert kinds == {
        "1/a1": ["prefill", "decode"],
        "1/a2": ["queue", "prefill", "decode"],
        "answer": ["prefill", "decode"],
    }


@pytest.mark.parametrize("streaming", ["barrier", "overlap", "staircase"])
def test_spans_of_writing_are_in_order_and_within_the_run(streaming: str) -> None:
    spec = {"policy": {"streaming": streaming, "chunk_tokens": 16}}
    result = _run(3, 3, spec=spec, faults=[{"agent": "a1", "times": 1, "after_tokens": 50}])
    timeline = Timeline(result.trace)
    assert timeline.ttft_s == result.ttft_s and timeline.total_s == pytest.approx(result.total_s)
    assert {row.call for row in timeline.rows} == {record.call for record in result.agents}
    assert [row.call for row in timeline.rows][-1] == "answer"
    for row in timeline.rows:
        own = [span for span in row.spans if span.kind != "warm-up"]
        assert all(0 <= span.start <= span.end <= timeline.total_s + 1e-9 for span in row.spans)
        assert all(before.end <= after.start + 1e-9 for before, after in pairwise(own))
    assert any(span.kind == "lost" for row in timeline.rows for span in row.spans)
    assert any(span.kind == "warm-up" for row in timeline.rows for span in row.spans) == (streaming != "barrier")
