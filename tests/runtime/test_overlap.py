from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from moa_ray.engines import EngineInfo, EngineRequest, Scripted, Usage
from moa_ray.errors import EngineUnavailable
from moa_ray.runtime import AgentFinished, AgentStarted, AgentWarmed, Notice, RunOptions, RunResult
from tests.runtime.panels import panel

TIMES: Mapping[str, Any] = {"ttft_s": 0.01, "itl_s": 0.0005, "reply_tokens": 120}


def _overlap(layout: str = "woven", **policy: Any) -> dict[str, Any]:
    return {"prompt": layout, "policy": {"streaming": "overlap", **policy}}


def _warmed(result: RunResult) -> list[AgentWarmed]:
    return [event for event in result.trace if isinstance(event, AgentWarmed)]


@pytest.mark.parametrize("layout", ["stable", "woven", "paper"])
async def test_every_call_asks_exactly_what_it_asks_in_barrier_mode(layout: str) -> None:
    asked = []
    for streaming in ("barrier", "overlap"):
        run, engine = panel(3, 3, spec={"prompt": layout, "policy": {"streaming": streaming}}, **TIMES)
        result = await run.run("why?")
        asked.append({call.id.partition("/")[2]: (call.messages, call.sampling) for call in engine.calls})
        assert len(engine.calls) == 7 and result.text.split()[-1] == "120"
    assert len(asked[0]) == 7 and asked[0] == asked[1]


@pytest.mark.parametrize(("layout", "least"), [("stable", 0.4), ("woven", 0.75)])
async def test_most_of_a_prompt_is_in_the_cache_when_the_call_begins(layout: str, least: float) -> None:
    run, _ = panel(3, spec=_overlap(layout), **TIMES)
    result = await run.run("why?")
    (answer,) = (record for record in result.agents if record.call == "answer")
    assert answer.usage.cached_tokens / answer.usage.prompt_tokens > least


async def test_warm_ups_are_told_and_accounted_apart_from_the_call() -> None:
    run, _ = panel(3, spec=_overlap(), **TIMES)
    result = await run.run("why?")
    (answer,) = (record for record in result.agents if record.call == "answer")
    events = _warmed(result)
    assert len(events) > 1 and {event.call for event in events} == {"answer"}
    assert answer.warmed == sum((event.usage for event in events), Usage())
    assert result.usage == sum((record.usage for record in result.agents), Usage()) + answer.warmed
    first = next(event for event in result.trace if isinstance(event, AgentStarted) and event.call == "answer")
    assert all(event.t <= first.t for event in events)


async def test_the_reader_gets_no_pieces_of_proposals_that_it_did_not_ask_for() -> None:
    run, _ = panel(2, spec=_overlap(), **TIMES)
    assert "agent.delta" not in {event.name for event in (await run.run("why?")).trace}
    run, _ = panel(2, spec=_overlap(), **TIMES)
    assert "agent.delta" in {event.name for event in (await run.run("why?", RunOptions(draft_flush_s=0.0))).trace}


@pytest.mark.parametrize(
    ("layout", "instructions", "whose"),
    [
        ("stable", {}, {"2/a1"}),
        ("stable", {"a2": {"system": "be kind"}}, {"2/a1", "2/a2"}),
        ("woven", {"a2": {"system": "be kind"}}, {"2/a1"}),
    ],
)
async def test_agents_whose_prompts_begin_the_same_are_warmed_once(
    layout: str, instructions: dict[str, Any], whose: set[str]
) -> None:
    run, _ = panel(2, 2, spec=_overlap(layout), agents=instructions, **TIMES)
    assert {event.call for event in _warmed(await run.run("why?")) if event.layer == 2} == whose


async def test_agents_of_one_engine_read_a_woven_prompt_once() -> None:
    personas = {name: {"system": f"you are {name}"} for name in ("a1", "a2", "a3")}
    read = {}
    for layout in ("stable", "woven"):
        run, _ = panel(3, 3, spec=_overlap(layout), agents=personas, **TIMES)
        records = [record for record in (await run.run("why? " * 200)).agents if record.layer == 2]
        usage = sum((record.usage + record.warmed for record in records), Usage())
        read[layout] = usage.prompt_tokens - usage.cached_tokens
    assert read["woven"] < read["stable"] / 2


class _Forgetful(Scripted):
    async def warm(self, request: EngineRequest) -> Usage:
        self._prefixes.clear()
        return await super().warm(request)


class _Broken(Scripted):
    async def warm(self, request: EngineRequest) -> Usage:
        raise EngineUnavailable("no")


class _Cacheless(Scripted):
    async def info(self) -> EngineInfo:
        return EngineInfo("m")

    async def warm(self, request: EngineRequest) -> Usage:
        raise AssertionError("warmed an engine without a cache")


def _over(kind: type[Scripted], *layers: int) -> Any:
    run, engine = panel(*layers, spec=_overlap(), **TIMES)
    run.engines = {"script": kind(engine.options)}
    return run


async def test_warming_stops_when_it_does_not_pay() -> None:
    assert len(_warmed(await _over(_Forgetful, 3).run("why?"))) == 2


async def test_a_warm_up_that_fails_harms_nobody() -> None:
    result = await _over(_Broken, 3).run("why?")
    assert {record.state for record in result.agents} == {"finished"} and not _warmed(result)


async def test_an_engine_without_a_prefix_cache_runs_in_barrier_mode_and_says_so_once() -> None:
    result = await _over(_Cacheless, 2, 2).run("why?")
    (notice,) = (event for event in result.trace if isinstance(event, Notice))
    assert notice.text == "barrier in place of overlap: engine script keeps no beginnings of prompts"
    assert {record.state for record in result.agents} == {"finished"}


async def test_a_lost_proposal_is_left_out_and_the_rest_goes_on() -> None:
    faults = [{"agent": "a1", "kind": "refused", "after_tokens": 60}]
    run, engine = panel(3, spec=_overlap(), faults=faults, **TIMES)
    result = await run.run("why?")
    (started,) = (e for e in result.trace if isinstance(e, AgentStarted) and e.call == "answer")
    assert started.proposals == 2 and engine.calls[-1].agent == "chief"
    assert "<draft 2>" in engine.calls[-1].messages[-1]["content"]
    assert "<draft 3>" not in engine.calls[-1].messages[-1]["content"]


async def test_a_request_may_ask_for_another_mode() -> None:
    run, _ = panel(2, **TIMES)
    assert _warmed(await run.run("why?", RunOptions(policy={"streaming": "overlap"})))


async def test_finished_calls_tell_how_long_their_prompt_was_read() -> None:
    run, _ = panel(2, ttft_s=0.02, concurrency=1, reply="x")
    finished = [e for e in (await run.run("why?")).trace if isinstance(e, AgentFinished)]
    assert all(e.prefill_s == 0.02 for e in finished)
