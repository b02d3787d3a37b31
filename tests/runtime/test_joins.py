"""Quorum, grace, patience, required agents and deadlines of layers, in virtual time."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from moa_ray.errors import QuorumNotMet
from moa_ray.runtime import AgentCancelled, RunOptions, RunResult
from tests.runtime.panels import panel
from tests.runtime.virtual import simulate

SECONDS = {"a1": 1, "a2": 2, "a3": 50}
"""When each agent is done; the aggregator takes no time."""


def _result(policy: dict[str, Any], agents: dict[str, Any] | None = None, **options: Any) -> RunResult:
    times = {name: float(seconds) for name, seconds in SECONDS.items()}
    spec = {"policy": policy}
    run, engine = panel(3, spec=spec, agents=agents, ttft_s=1.0, slowdown={**times, "chief": 0.0}, **options)
    result = simulate(run.run("why?"))
    assert engine.active == 0
    return result


def _states(result: RunResult) -> dict[str, str]:
    return {record.agent: record.state for record in result.agents}


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        ({"quorum": 2}, 50),
        ({"quorum": 1, "grace_s": 0}, 1),
        ({"quorum": 2, "grace_s": 3}, 5),
        ({"quorum": 2, "grace_s": 60}, 50),
        ({"quorum": 2, "layer_deadline_s": 10}, 10),
    ],
)
def test_a_layer_is_done_with_its_quorum_and_grace_or_when_its_time_is_up(policy: dict[str, Any], seconds: int) -> None:
    assert _result(policy).total_s == pytest.approx(seconds)


def test_the_slow_one_decodes_nothing_after_the_cut_and_its_tokens_are_accounted_for() -> None:
    policy = {"quorum": 2, "grace_s": 1}
    times = {"a1": 1.0, "a2": 1.0, "a3": 100.0, "chief": 1.0}
    run, engine = panel(3, spec={"policy": policy}, reply_tokens=40, itl_s=0.01, slowdown=times)

    async def main() -> RunResult:
        events = [event async for event in run.stream("why?", RunOptions(draft_flush_s=0))]
        return RunResult.of(events)

    result = simulate(main())
    (cut,) = [event for event in result.trace if isinstance(event, AgentCancelled)]
    assert cut.agent == "a3" and 0 < cut.usage.completion_tokens < 40
    assert engine.decoded == result.usage.completion_tokens


@pytest.mark.parametrize(
    ("policy", "longest_s"),
    [
        ({"quorum": 2}, inf),
        ({"quorum": 2, "grace_s": 9}, 0.5),
        ({"layer_deadline_s": 9}, 0.5),
        ({"early_exit": {"proposals": 2}}, 0.5),
    ],
)
async def test_only_a_proposal_that_may_be_cut_off_is_told_of_before_its_end(
    policy: dict[str, Any], longest_s: float
) -> None:
    run, engine = panel(3, spec={"policy": policy})
    await run.run("why?", RunOptions(answer_flush_s=inf))
    assert {call.agent: call.flush_s for call in engine.calls} == {
        **dict.fromkeys(("a1", "a2", "a3"), longest_s),
        "chief": inf,
    }


def test_a_required_agent_is_waited_for_whatever_the_quorum() -> None:
    result = _result({"quorum": 1, "grace_s": 0}, {"a2": {"required": True}})
    assert result.total_s == pytest.approx(2)
    assert _states(result) == {"a1": "finished", "a2": "finished", "a3": "cancelled", "chief": "finished"}


def test_without_a_required_agent_the_run_fails_at_once_and_names_it() -> None:
    fault = {"agent": "a1", "kind": "refused"}
    with pytest.raises(QuorumNotMet, match=r"1/a1 required: 1/a1 \(EngineRefused"):
        _result({"quorum": 1}, {"a1": {"required": True}}, faults=[fault])


def test_an_agent_with_more_patience_is_waited_for_longer_than_the_rest() -> None:
    policy = {"quorum": 1, "grace_s": 0.5}
    assert _result(policy, {"a3": {"patience_s": 60}}).total_s == pytest.approx(50)
    result = _result(policy, {"a2": {"patience_s": 5}})
    assert result.total_s == pytest.approx(2)
    assert _states(result)["a3"] == "cancelled"


@pytest.mark.parametrize("kind", ["hang", "unavailable"])
@pytest.mark.parametrize("after_tokens", [0, 3])
def test_one_bad_proposer_costs_no_more_than_the_grace(kind: str, after_tokens: int) -> None:
    """The issue's bar: at most 1.1 times the run without it, plus the grace."""
    script: dict[str, Any] = {"ttft_s": 0.2, "itl_s": 0.006, "reply_tokens": 100}
    policy = {"quorum": 2, "grace_s": 0.3, "retries": 1}

    def total_s(**options: Any) -> float:
        run, _ = panel(3, 3, spec={"policy": policy}, **script, **options)
        return simulate(run.run("why?")).total_s

    fault = {"agent": "a1", "kind": kind, "after_tokens": after_tokens}
    assert total_s(faults=[fault]) <= 1.1 * total_s() + 2 * 0.3
