"""What the calls between actors bear: arguments of any size, and an actor that goes away meanwhile."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray
from ray import serve

from moa_ray import MoA
from moa_ray.errors import EngineUnavailable, QuorumNotMet
from moa_ray.graph import from_dict
from moa_ray.runtime import AgentFailed, AgentFinished, AgentStarted, AnswerDelta, RunFinished
from tests.conftest import until

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]


def panel(script: dict[str, Any], chief: dict[str, Any] | None = None, **policy: Any) -> MoA:
    """Two proposers on `script`, an aggregator on an engine of its own."""
    graph = from_dict(
        {
            "version": 1,
            "name": "panel",
            "engines": {
                "script": {"kind": "scripted", "model": "m", **script},
                "chief": {"kind": "scripted", "model": "m", **(chief or {})},
            },
            "agents": {name: {"engine": "script"} for name in ("a1", "a2")} | {"chief": {"engine": "chief"}},
            "layers": [["a1", "a2"]],
            "aggregator": "chief",
            "policy": policy,
        }
    )
    return MoA(graph)


def kill(app: str, engine: str) -> None:
    """Take the only replica of an engine away, as a node that fails would."""
    (name,) = [
        a for a in ray.util.list_named_actors(all_namespaces=True) if f"{app}#engine.panel.{engine}#" in a["name"]
    ]
    ray.kill(ray.get_actor(name["name"], namespace=name["namespace"]))


def test_a_prompt_larger_than_a_message_between_replicas_arrives() -> None:
    words = 1_000_000
    with panel({"reply": "x"}, {"reply": "x"}) as moa:
        result = moa.run("word " * words)
        assert [call.state for call in result.agents] == ["finished"] * 3
        assert all(call.usage.prompt_tokens > words for call in result.agents)


def test_a_replica_that_dies_while_it_answers_costs_its_agents_only() -> None:
    slow = {"itl_s": 0.02, "reply_tokens": 10_000}
    with panel(slow, {"reply": "the end"}, retries=0, quorum=1, grace_s=0) as moa:
        seen: list[Any] = []
        events = moa.events("why?")
        for event in events:
            seen.append(event)
            if sum(isinstance(e, AgentStarted) for e in seen) == 2:
                break
        time.sleep(0.5)
        started = time.monotonic()
        kill(moa.app, "script")
        with pytest.raises(QuorumNotMet, match="0 of 2 agents"):
            seen.extend(events)
        failed = [e for e in seen if isinstance(e, AgentFailed)]
        assert {e.agent for e in failed} == {"a1", "a2"}
        assert time.monotonic() - started < 20


def test_a_call_whose_replica_dies_is_tried_again_on_the_next_one() -> None:
    with panel({"reply": "x", "ttft_s": 2.0}, {"reply": "the end"}, retries=10) as moa:
        events = moa.events("why?")
        assert any(isinstance(event, AgentStarted) for event in events)
        kill(moa.app, "script")
        rest = list(events)
        assert {e.agent for e in rest if isinstance(e, AgentFinished)} == {"a1", "a2", "chief"}
        assert isinstance(rest[-1], RunFinished) and rest[-1].text == "the end"


def test_an_aggregator_that_dies_while_it_streams_ends_the_run_with_its_name() -> None:
    with panel({"reply": "x"}, {"itl_s": 0.02, "reply_tokens": 10_000}, retries=0) as moa:
        events = moa.events("why?")
        assert any(isinstance(e, AnswerDelta) for e in events)
        kill(moa.app, "chief")
        with pytest.raises(EngineUnavailable) as raised:
            for _ in events:
                pass
        assert raised.value.engine == "chief"
        until(lambda: serve.status().applications[moa.app].status == "RUNNING")
