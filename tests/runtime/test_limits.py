from __future__ import annotations

from typing import Any

import pytest

from moa_ray.errors import ModelNotFound, RequestError
from moa_ray.runtime import RunOptions
from moa_ray.runtime.limits import answer_for, counts_for, policy_for
from tests.runtime.panels import panel


def test_a_request_may_be_more_modest_than_the_policy() -> None:
    graph = panel(3, spec={"policy": {"retries": 2, "deadline_s": 60}})[0].graph
    policy = policy_for(graph, {"quorum": 3, "deadline_s": 5, "retries": 0})
    assert (policy.quorum, policy.deadline_s, policy.retries) == (3, 5, 0)


def test_without_wishes_the_policy_is_the_graphs_own() -> None:
    graph = panel(3)[0].graph
    assert policy_for(graph, {}) is graph.spec.policy


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"deadline_s": 61}, r"policy\.deadline_s: 61 is more than the 60 allowed here"),
        ({"retries": 3}, r"policy\.retries: 3 is more than the 2 allowed here"),
        ({"quorum": 4}, r"policy\.quorum: 4 is more than the 3 allowed here"),
        ({"quorum": 0}, r"policy\.quorum: .*greater than 0"),
        ({"deadline_s": "soon"}, r"policy\.deadline_s: "),
        ({"deadlin_s": 1}, r"(?s)policy\.deadlin_s: .*did you mean 'deadline_s'"),
    ],
)
def test_a_wish_beyond_the_limits_is_refused_with_its_key(wanted: dict[str, Any], message: str) -> None:
    graph = panel(3, spec={"policy": {"retries": 2, "deadline_s": 60}})[0].graph
    with pytest.raises(RequestError, match=message):
        policy_for(graph, wanted)


def test_the_deployer_may_allow_more_than_the_policy_gives() -> None:
    spec = {"policy": {"retries": 0, "deadline_s": 10}, "limits": {"retries": 4, "deadline_s": 100}}
    graph = panel(3, spec=spec)[0].graph
    assert policy_for(graph, {"retries": 4, "deadline_s": 100}).deadline_s == 100
    assert policy_for(graph, {}).deadline_s == 10


def test_an_unknown_agent_is_refused_with_the_one_that_was_meant() -> None:
    graph = panel(3)[0].graph
    with pytest.raises(ModelNotFound, match=r"(?s)panel has no agent 'cheif'.*did you mean 'chief'"):
        answer_for(graph, "cheif")


async def test_a_run_whose_wishes_are_refused_asks_no_engine() -> None:
    run, engine = panel(3)
    with pytest.raises(RequestError):
        await run.run("why?", RunOptions(policy={"quorum": 9}))
    assert not engine.calls


async def test_a_request_may_choose_how_it_is_streamed() -> None:
    run, _ = panel(2, ttft_s=0.01, itl_s=0.02, reply_tokens=80)
    result = await run.run("why?", RunOptions(policy={"streaming": "staircase", "chunk_tokens": 8, "patience": 0.1}))
    assert result.agents[-1].stages > 1 and result.text.split()[-1] == "80"
    with pytest.raises(RequestError, match=r"policy\.streaming"):
        await run.run("why?", RunOptions(policy={"streaming": "stairs"}))


async def test_k_asks_only_the_first_agents_of_each_layer() -> None:
    run, engine = panel(3, 3)
    await run.run("why?", RunOptions(k=(1, 2)))
    assert sorted(call.agent for call in engine.calls) == ["a1", "a1", "a2", "chief"]
    result = await run.run("why?", RunOptions(k=2))
    assert [record.call for record in result.agents] == ["1/a1", "1/a2", "2/a1", "2/a2", "answer"]


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (1, "layer 1 has 3 agents and a quorum of 2; 1 is not between"),
        ((3, 4), "layer 2 has 3 agents and a quorum of 2; 4 is not between"),
        ((3,), "1 numbers for the 2 layers of panel"),
    ],
)
def test_a_k_that_does_not_fit_the_layers_or_the_quorum_is_refused(k: Any, message: str) -> None:
    graph = panel(3, 3, spec={"policy": {"quorum": 2}})[0].graph
    with pytest.raises(RequestError, match=message):
        counts_for(graph, k)
