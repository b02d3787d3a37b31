from __future__ import annotations

from typing import Any

import pytest

from moa_ray.errors import SpecError
from moa_ray.gates import registry
from moa_ray.runtime import GateDecided, RunOptions, RunResult
from tests.runtime.panels import panel

WHO = {"a1": {"system": "You know law."}, "a2": {"system": "You know maths."}}


def decided(result: RunResult) -> GateDecided:
    (event,) = (event for event in result.trace if isinstance(event, GateDecided))
    return event


def asks(kind: str, *layers: int, replies: dict[str, str], **gate: Any) -> Any:
    """A panel whose gate asks `chief`."""
    spec = {"gate": {"kind": kind, "agent": "chief", **gate}}
    return panel(*layers, spec=spec, agents=WHO, replies=replies)


async def test_an_agent_picks_by_what_the_others_are_good_at() -> None:
    run, engine = asks("llm", 3, k=1, replies={"chief": "2, then 3"})
    result = await run.run("what is 2 + 2?")
    assert [record.call for record in result.agents] == ["gate/chief", "1/a2", "answer"]
    asked = engine.calls[0].messages[-1]["content"]
    assert "2. You know maths." in asked and "3. a3" in asked and "the numbers of the one" in asked
    assert dict(decided(result).weights) == {"a2": 1.0, "a3": 0.5}


async def test_a_verdict_that_names_nobody_chooses_everybody() -> None:
    run, _ = asks("llm", 3, k=3, replies={"chief": "I would rather not"})
    result = await run.run("why?")
    assert len(decided(result).layers[0]) == 3 and "named nobody" in decided(result).note


async def test_a_picker_that_fails_leaves_the_whole_panel() -> None:
    spec = {"gate": {"kind": "llm", "agent": "chief", "k": 1}}
    faults = [{"agent": "chief", "kind": "unavailable", "times": 2}]
    run, _ = panel(3, spec=spec, agents=WHO, faults=faults)
    result = await run.run("why?")
    assert decided(result).failed and len(decided(result).layers[0]) == 3
    assert result.text


async def test_a_cheap_agent_that_always_says_the_same_answers_for_the_panel() -> None:
    run, engine = asks("cascade", 3, replies={"chief": "It is 4."})
    result = await run.run("what is 2 + 2?")
    assert result.text == "It is 4." and len(engine.calls) == 3
    assert decided(result).calls == 0 and "confident to 1.00" in decided(result).note
    assert result.trace[-1].source.startswith("gate/chief")


async def test_a_cheap_agent_that_contradicts_itself_calls_the_panel() -> None:
    run, engine = asks("cascade", 3, replies={"chief": "It is {call}."})
    result = await run.run("what is 2 + 2?")
    assert len(engine.calls) == 3 + 3 + 1 and decided(result).calls == 4


@pytest.mark.parametrize(("logprob", "calls"), [(-0.1, 1), (-1.0, 5)])
async def test_a_cheap_agent_that_is_sure_of_its_tokens_answers_for_the_panel(logprob: float, calls: int) -> None:
    spec = {"gate": {"kind": "cascade", "agent": "chief", "confidence": "logprob", "threshold": 0.6}}
    run, engine = panel(3, spec=spec, agents={"chief": {"temperature": 0}}, logprob=logprob, reply_tokens=20)
    await run.run("why?")
    assert len(engine.calls) == calls


async def test_a_cascade_by_probability_says_when_the_engine_tells_none() -> None:
    run, _ = asks("cascade", 3, confidence="logprob", replies={"chief": "4"})
    result = await run.run("why?")
    assert "tells no log-probabilities" in decided(result).note and len(decided(result).layers[0]) == 3


async def test_an_answer_with_tools_is_the_aggregators() -> None:
    run, engine = asks("cascade", 3, replies={"chief": "4"})
    result = await run.run("why?", RunOptions(extra={"tools": [{"type": "function"}]}))
    assert len(engine.calls) == 4 and "tools" in decided(result).note


@pytest.mark.parametrize(
    ("gate", "agents", "says"),
    [
        ({"kind": "llm"}, {}, "asks an agent"),
        ({"kind": "llm", "agent": "chif"}, {}, r"gate\.agent: there is no agent 'chif'"),
        ({"kind": "llm", "agent": "chief", "about": {"zed": "x"}}, {}, "about: there is no agent 'zed'"),
        ({"kind": "cascade", "agent": "chief"}, {"chief": {"temperature": 0}}, "always agree"),
        ({"kind": "cascade", "agent": "chief", "measure": "wrds"}, {}, "did you mean 'words'"),
        ({"kind": "cascade", "agent": "chief", "samples": 1}, {}, r"gate\.samples"),
        ({"kind": "casc"}, {}, "there is no gate kind 'casc'"),
        ({"kind": "random"}, {}, "a random gate needs k"),
        ({"kind": "random", "k": 4}, {}, r"gate\.k: 4 agents cannot be picked"),
        ({"kind": "all", "k": 1}, {}, r"gate\.k: kind: all asks every agent"),
        ({"kind": "rules", "rules": [{"when": {}, "agents": ["chief"]}]}, {}, "no layer has an agent 'chief'"),
        ({"kind": "rules", "rules": [{"when": {"matches": "("}, "agents": ["a1"]}]}, {}, "no regular expression"),
    ],
)
def test_a_gate_that_cannot_be_is_told(gate: dict[str, Any], agents: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        registry.check(panel(3, spec={"gate": gate}, agents=agents)[0].graph)


def test_a_gate_below_the_quorum_and_one_without_layers_are_told() -> None:
    with pytest.raises(SpecError, match="never make the quorum of 2"):
        panel(3, spec={"gate": {"kind": "random", "k": 1}, "policy": {"quorum": 2}})
    nodes = {"x": {"agent": "a1"}}
    with pytest.raises(SpecError, match="a gate picks agents of layers"):
        panel(1, spec={"gate": {"kind": "random", "k": 1}, "layers": [], "nodes": nodes})
