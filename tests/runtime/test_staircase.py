from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.engines import EngineInfo, EngineRequest, Scripted, ScriptedOptions, Usage
from moa_ray.errors import QuorumNotMet
from moa_ray.graph import from_dict
from moa_ray.runtime import (
    AgentFinished,
    AgentPaused,
    AgentStarted,
    AnswerDelta,
    Event,
    Notice,
    RunFinished,
    Runner,
    RunOptions,
    RunResult,
)
from tests.runtime.panels import panel
from tests.runtime.virtual import simulate

TIMES: Mapping[str, Any] = {"ttft_s": 0.2, "itl_s": 0.01, "reply_tokens": 200, "prefill_s_per_token": 0.0005}
NUMBERS = [str(n) for n in range(1, 201)]


def _stairs(prompt: str = "stable", **policy: Any) -> dict[str, Any]:
    return {"prompt": prompt, "policy": {"streaming": "staircase", "chunk_tokens": 32, **policy}}


def _climb(*layers: int, spec: Mapping[str, Any] | None = None, **options: Any) -> tuple[RunResult, Scripted]:
    run, engine = panel(*layers, spec=spec or _stairs(), **{**TIMES, **options})
    return simulate(run.run("why?")), engine


def _last(engine: Scripted, agent: str) -> EngineRequest:
    return [call for call in engine.calls if call.agent == agent][-1]


def _first(result: RunResult, kind: type[Event], call: str | None = None) -> float:
    return next(e.t for e in result.trace if isinstance(e, kind) and (call is None or getattr(e, "call", "") == call))


# ---------------------------------------------------------------- what is written, on what


@pytest.mark.parametrize("prompt", ["stable", "woven", "paper"])
@pytest.mark.parametrize("layers", [(3,), (3, 3), (2, 3, 2)])
def test_the_last_stretch_of_every_text_is_written_on_barriers_prompt(prompt: str, layers: tuple[int, ...]) -> None:
    replies = {f"a{n}": " ".join(f"w{n}.{k}" for k in range(150)) for n in (1, 2, 3)}
    asked = {}
    for streaming in ("barrier", "staircase"):
        spec = {"prompt": prompt, "policy": {"streaming": streaming, "chunk_tokens": 16}}
        result, engine = _climb(*layers, spec=spec, reply_tokens=None, replies=replies, reply="the answer " * 40)
        asked[streaming] = {call.id.split("/")[-2] + call.id.split("/")[1]: call.messages for call in engine.calls}
        assert result.text == "the answer " * 40
        assert {r.text for r in result.agents if r.agent == "a1"} == {replies["a1"]}
    assert asked["staircase"] == asked["barrier"]  # by call, the last request counts
    last = _last(engine, "chief").messages
    if prompt == "stable":
        assert all(text in last[-1]["content"] for text in list(replies.values())[: layers[-1]])


def test_the_last_stretch_is_never_empty_handed_where_the_answer_is_bounded() -> None:
    run, engine = panel(2, spec=_stairs(), agents={"chief": {"max_tokens": 9}}, **TIMES)
    assert simulate(run.run("why?")).text.split() == NUMBERS[:9]
    assert len(_last(engine, "chief").continue_from.split()) < 9
    assert "…" not in _last(engine, "chief").messages[-1]["content"]


def test_a_text_that_seems_complete_early_is_ended_only_on_complete_proposals() -> None:
    result, engine = _climb(2, reply_tokens=None, reply="brief", replies={"a1": "x " * 200, "a2": "y " * 200})
    calls = [call for call in engine.calls if call.agent == "chief"]
    assert [call.continue_from for call in calls] == ["", "brief"]
    assert ("x " * 200).strip() in calls[-1].messages[-1]["content"]
    assert result.text == "brief" and result.agents[-1].state == "finished"


# ---------------------------------------------------------------- when


def test_the_answer_begins_before_any_layer_is_done_and_takes_in_newer_text_as_it_goes() -> None:
    result, engine = _climb(3, 3, 3)
    assert result.text.split() == NUMBERS
    assert _first(result, AnswerDelta) < _first(result, AgentFinished, "1/a1")
    prompts = [call.messages[-1]["content"] for call in engine.calls if call.agent == "chief"]
    assert len(prompts) > 3 and len(set(prompts)) == len(prompts)
    assert sum("…" in prompt for prompt in prompts) == len(prompts) - 1
    first_layer = [call for call in engine.calls if call.id.split("/")[1] == "1"]
    assert len(first_layer) == 3  # nothing to take in there


def test_patience_says_how_much_of_the_proposals_the_answer_waits_for() -> None:
    begun = []
    for patience in (0.0, 0.5, 1.0):
        run, _ = panel(2, spec={**_stairs(patience=patience), "proposal_max_tokens": 200}, **TIMES)
        result = simulate(run.run("why?"))
        begun.append(_first(result, AgentStarted, "answer"))
    assert begun[0] < begun[1] < begun[2]
    assert begun[1] >= 0.2 + 98 * 0.01 and begun[2] >= _first(result, AgentFinished, "1/a1")


def test_a_quorum_of_first_chunks_is_enough_to_begin() -> None:
    options = {"slowdown": {"a3": 20.0}}
    for quorum, waits in ((2, False), (3, True)):
        run, _ = panel(3, spec=_stairs(quorum=quorum), **TIMES, **options)
        result = simulate(run.run("why?"))
        assert (_first(result, AgentStarted, "answer") > 4) == waits


@given(
    ttft_s=st.lists(st.floats(0, 2), min_size=7, max_size=7),
    itl_s=st.lists(st.floats(0.001, 0.1), min_size=7, max_size=7),
    tokens=st.lists(st.integers(1, 300), min_size=7, max_size=7),
    chunk=st.integers(1, 100),
    prompt=st.sampled_from(["stable", "woven"]),
)
def test_it_is_never_much_slower_than_barrier(
    ttft_s: list[float], itl_s: list[float], tokens: list[int], chunk: int, prompt: str
) -> None:
    names = ["a", "b", "c", "d", "e", "f", "chief"]
    took = {}
    for streaming in ("barrier", "staircase"):
        options = {
            name: {"ttft_s": ttft_s[n], "itl_s": itl_s[n], "reply_tokens": tokens[n], "prefill_s_per_token": 0.0002}
            for n, name in enumerate(names)
        }
        graph = from_dict(
            {
                "version": 1,
                "name": "panel",
                "engines": {name: {"kind": "scripted", "model": "m", **options[name]} for name in names},
                "agents": {name: {"engine": name} for name in names},
                "layers": [["a", "b", "c"], ["d", "e", "f"]],
                "aggregator": "chief",
                "prompt": prompt,
                "policy": {"streaming": streaming, "chunk_tokens": chunk},
            }
        )
        engines = {name: Scripted(ScriptedOptions.model_validate(options[name])) for name in names}
        result = simulate(Runner(graph, engines).run("why?"))
        assert result.text.split() == [str(n) for n in range(1, tokens[-1] + 1)]
        took[streaming] = result
    assert took["staircase"].ttft_s is not None and took["barrier"].ttft_s is not None
    assert took["staircase"].ttft_s <= took["barrier"].ttft_s + 0.1
    # A stage that has begun to write when the proposals are complete is let write: at most the time that the last
    # stage then takes to begin is lost by it, in each layer.
    assert took["staircase"].total_s <= took["barrier"].total_s + max(ttft_s[3:6]) + ttft_s[6] + 0.2


# ---------------------------------------------------------------- when something fails halfway


def test_a_proposer_that_fails_halfway_and_is_tried_again_is_seen_whole_in_the_end() -> None:
    result, engine = _climb(2, faults=[{"agent": "a1", "times": 1, "after_tokens": 90}], continues=True)
    assert result.text.split() == NUMBERS
    last = _last(engine, "chief").messages[-1]["content"]
    assert last.count(" ".join(NUMBERS)) == 2


def test_a_proposer_that_is_lost_halfway_is_not_in_the_last_prompt() -> None:
    faults = [{"agent": "a1", "kind": "refused", "after_tokens": 90}]
    result, engine = _climb(2, faults=faults)
    assert result.text.split() == NUMBERS
    prompts = [call.messages[-1]["content"] for call in engine.calls if call.agent == "chief"]
    assert '<draft number="2">' in prompts[0] and '<draft number="2">' not in prompts[-1]
    assert {record.call: record.state for record in result.agents}["1/a1"] == "failed"


def test_below_quorum_a_begun_answer_ends_with_the_error_that_names_the_agents() -> None:
    faults = [{"agent": agent, "kind": "refused", "after_tokens": 150} for agent in ("a1", "a2")]
    run, engine = panel(2, spec=_stairs(), faults=faults, **TIMES)
    seen: list[Event] = []

    async def main() -> None:
        async for event in run.stream("why?"):
            seen.append(event)

    with pytest.raises(QuorumNotMet, match="1/a1"):
        simulate(main())
    end = seen[-1]
    assert isinstance(end, RunFinished) and end.error == "QuorumNotMet" and end.text.split()[:3] == NUMBERS[:3]
    assert engine.active == 0


def test_an_answer_that_breaks_off_in_a_stage_goes_on_and_repeats_nothing() -> None:
    result, _ = _climb(2, faults=[{"agent": "chief", "first": 2, "times": 1, "after_tokens": 10}])
    assert result.text.split() == NUMBERS
    assert "".join(e.text for e in result.trace if isinstance(e, AnswerDelta)).split() == NUMBERS


def test_a_run_that_is_given_up_leaves_nothing_running() -> None:
    run, engine = panel(3, 3, spec=_stairs(), **TIMES)

    async def main() -> None:
        events = run.stream("why?")
        async for event in events:
            if isinstance(event, AnswerDelta):
                break
        await events.aclose()
        assert engine.active == 0

    simulate(main())


# ---------------------------------------------------------------- what is told


def test_every_stage_is_told_and_accounted() -> None:
    result, _ = _climb(2)
    answer = result.agents[-1]
    started = [e for e in result.trace if isinstance(e, AgentStarted) and e.call == "answer"]
    ends = [e for e in result.trace if isinstance(e, AgentPaused | AgentFinished) and e.call == "answer"]
    assert [e.stage for e in started] == list(range(1, len(started) + 1)) and len(ends) == len(started) > 2
    assert answer.stages == len(started) and answer.attempts == len(started) and answer.retries == 0
    assert answer.usage == sum((e.usage for e in ends), Usage())
    assert answer.usage.completion_tokens == 200
    assert answer.ttft_s == ends[0].ttft_s
    assert started[1].continued == len(" ".join(NUMBERS[: ends[0].usage.completion_tokens])) + 1


class _Limited(Scripted):
    def __init__(self, options: ScriptedOptions, info: EngineInfo) -> None:
        super().__init__(options)
        self._known = info

    async def info(self) -> EngineInfo:
        return self._known


@pytest.mark.parametrize(
    ("info", "text"),
    [
        (EngineInfo("m", prefix_cache=True), "overlap in place of staircase: engine script cannot continue a text"),
        (EngineInfo("m"), "barrier in place of staircase: engine script keeps no beginnings of prompts"),
    ],
)
def test_an_engine_that_cannot_climb_does_the_best_it_can_and_says_so_once(info: EngineInfo, text: str) -> None:
    run, engine = panel(2, 2, spec=_stairs(), **TIMES)
    run.engines = {"script": _Limited(engine.options, info)}
    result = simulate(run.run("why?"))
    assert [event.text for event in result.trace if isinstance(event, Notice)] == [text]
    assert {record.stages for record in result.agents} == {1} and result.text.split() == NUMBERS


def test_who_picks_a_proposal_sees_them_whole() -> None:
    result, engine = _climb(3, spec={**_stairs(), "aggregator": {"rank": {"agent": "chief"}}})
    assert len([call for call in engine.calls if call.agent == "chief"]) == 1
    assert result.text.split() == NUMBERS and "whole" in next(e.text for e in result.trace if isinstance(e, Notice))


def test_an_answer_that_may_call_tools_is_written_at_once() -> None:
    run, engine = panel(2, spec=_stairs(), tool_call={"name": "look"}, **TIMES)
    result = simulate(run.run("why?", RunOptions(extra={"tools": [{"type": "function"}]})))
    assert len([call for call in engine.calls if call.agent == "chief"]) == 1
    assert any(isinstance(e, AnswerDelta) and e.tool_calls for e in result.trace)


def test_votes_are_counted_on_complete_proposals() -> None:
    run, _ = panel(2, 2, **TIMES)
    spec = run.graph.spec.model_dump(mode="json")
    del spec["agents"]["chief"]
    graph = from_dict({**spec, **_stairs(), "aggregator": {"vote": {"extract": "number"}}})
    result = simulate(Runner(graph, run.engines).run("why?"))
    assert result.text.split() == NUMBERS and "2 of 2" in result.note
