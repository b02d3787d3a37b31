from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.errors import MoARayError, RequestError
from moa_ray.gates import Choice, Question
from moa_ray.graph import Policy
from moa_ray.runtime import GateDecided, RunOptions, RunResult, to_json
from moa_ray.runtime.plan import Plan
from tests.runtime.panels import panel


class Says:
    """A gate that says what the test wants."""

    def __init__(self, says: Choice | Exception | float) -> None:
        self._says = says

    async def choose(self, question: Question) -> Choice:
        match self._says:
            case float():
                await asyncio.sleep(self._says)
                return Choice(dict.fromkeys(question.agents, 1.0))
            case Exception():
                raise self._says
            case Choice():
                return self._says

    async def close(self) -> None:
        pass


def gated(says: Choice | Exception | float, *layers: int, k: int | None = None, **spec: Any) -> Any:
    """A panel whose gate is `Says`."""
    run, engine = panel(*layers, spec={"gate": {"kind": "random", "k": k or max(layers)}, **spec})
    run.gate = (Says(says), 0.05)
    return run, engine


def decided(result: RunResult) -> GateDecided:
    (event,) = (event for event in result.trace if isinstance(event, GateDecided))
    return event


async def test_the_agents_that_count_most_answer_and_the_rest_is_not_asked() -> None:
    run, engine = gated(Choice({"a2": 0.2, "a3": 0.5, "a1": 0.0, "a4": 0.3}), 4, 4, k=2)
    result = await run.run("why?")
    assert {call.agent for call in engine.calls} == {"a3", "a4", "chief"}
    assert [record.call for record in result.agents] == ["1/a3", "1/a4", "2/a3", "2/a4", "answer"]
    event = decided(result)
    assert event.layers == (("a3", "a4"), ("a3", "a4")) and event.calls == 5 and not event.failed
    assert to_json(event)["weights"] == {"a2": 0.2, "a3": 0.5, "a1": 0.0, "a4": 0.3}


async def test_the_aggregator_is_told_how_much_each_draft_counts() -> None:
    run, engine = gated(Choice({"a1": 3.0, "a2": 1.0}), 3)
    await run.run("why?")
    prompt = engine.calls[-1].messages[-1]["content"]
    assert '<draft number="1" weight="0.75">' in prompt and '<draft number="2" weight="0.25">' in prompt
    assert "weight of a draft" in prompt


async def test_a_gate_that_explores_asks_agents_drawn_at_random_as_equals() -> None:
    spec: Any = {"gate": {"kind": "random", "k": 2, "explore": 1.0}}
    asked = set()
    for _ in range(40):
        run, engine = gated(Choice({"a1": 1.0}), 4, **spec)
        event = decided(await run.run("why?"))
        assert event.note == "explores" and event.calls == 3 and set(event.weights.values()) == {1.0}
        asked |= {call.agent for call in engine.calls}
    assert asked == {"a1", "a2", "a3", "a4", "chief"}


async def test_drafts_that_count_the_same_have_no_weight() -> None:
    run, engine = gated(Choice({"a1": 1.0, "a2": 1.0}), 3)
    await run.run("why?")
    assert "weight" not in engine.calls[-1].messages[-1]["content"]


async def test_one_agent_alone_answers_without_a_panel() -> None:
    run, engine = gated(Choice({"a2": 1.0}, alone="a2"), 3)
    result = await run.run("why?")
    assert [(call.agent, call.messages[-1]["content"]) for call in engine.calls] == [("a2", "why?")]
    assert [record.call for record in result.agents] == ["answer"] and decided(result).layers == ()


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (9.0, "no choice within 0.05 s"),
        (MoARayError("the file is gone"), "the file is gone"),
        (RuntimeError("boom"), "RuntimeError: boom"),
        (Choice({"a1": float("nan")}), "weights that are none"),
    ],
)
async def test_a_gate_that_is_slow_or_broken_is_left_out_and_everybody_answers(says: Any, reason: str) -> None:
    run, engine = gated(says, 3, k=1)
    result = await run.run("why?")
    assert len(engine.calls) == 4
    assert reason in decided(result).failed


async def test_a_required_agent_answers_whatever_the_gate_says() -> None:
    run, engine = panel(3, spec={"gate": {"kind": "random", "k": 1}}, agents={"a3": {"required": True}})
    run.gate = (Says(Choice({"a1": 1.0})), 0.05)
    await run.run("why?")
    assert {call.agent for call in engine.calls} == {"a1", "a3", "chief"}


async def test_a_layer_in_which_nobody_counts_answers_whole() -> None:
    run, _engine = gated(Choice({"a3": 1.0}), 3, 2)
    result = await run.run("why?")
    assert decided(result).layers == (("a3",), ("a1", "a2"))


async def test_a_request_may_want_more_or_fewer_agents() -> None:
    run, _engine = gated(Choice({"a1": 1.0, "a2": 2.0, "a3": 3.0}), 3, 3, k=2)
    result = await run.run("why?", RunOptions(k=(1, 3)))
    assert decided(result).layers == (("a3",), ("a1", "a2", "a3"))
    with pytest.raises(RequestError, match="k: layer 1 has 3 agents"):
        await run.run("why?", RunOptions(k=(4, 1)))


async def test_an_agent_that_is_asked_alone_needs_no_gate() -> None:
    run, _engine = gated(RuntimeError("boom"), 3)
    result = await run.run("why?", RunOptions(agent="a1"))
    assert not any(isinstance(event, GateDecided) for event in result.trace)


@pytest.mark.parametrize("streaming", ["overlap", "staircase"])
async def test_gates_and_streaming_modes_go_together(streaming: str) -> None:
    policy = {"streaming": streaming}
    run, engine = gated(Choice({"a1": 3.0, "a3": 1.0}), 3, 3, k=2, policy=policy, prompt="woven")
    result = await run.run("why?")
    last = [call for call in engine.calls if call.agent == "chief"][-1].messages[-1]["content"]
    assert '<draft 1 weight="0.75">' in last and '<draft 2 weight="0.25">' in last
    assert {record.agent for record in result.agents} == {"a1", "a3", "chief"}


NAMES = ("a1", "a2", "a3", "a4")


@given(
    weights=st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1)),
    k=st.integers(1, 4),
    quorum=st.integers(1, 4),
)
def test_a_layer_has_the_k_that_count_most_in_the_users_order(
    weights: Mapping[str, float], k: int, quorum: int
) -> None:
    graph = panel(4, 4, spec={"gate": {"kind": "random", "k": k}})[0].graph
    plan = Plan(graph, Policy(), (), RunOptions(), graph.calls, graph.answer, (k, k)).picked(weights)
    for layer in plan.graph.spec.layers:
        counting = [name for name in NAMES if weights.get(name, 0) > 0]
        assert layer == [name for name in NAMES if name in layer]
        assert len(layer) == (min(k, len(counting)) if counting else 4)
        left_out = [weights[name] for name in counting if name not in layer]
        assert not counting or max(left_out, default=0) <= min(weights[name] for name in layer)
    assert plan.answer is not None and {name for name in plan.answer.inputs} == {
        c.id for c in plan.calls if c.layer == 2
    }
