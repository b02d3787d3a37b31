from __future__ import annotations

from typing import Any

import pytest

from moa_ray.runtime import AgentSkipped, RunResult
from tests.runtime.panels import panel

SAME = {"a1": "It is 42.", "a2": "it is  42.", "a3": "It is 43."}


async def _run(*layers: int, policy: dict[str, Any], **options: Any) -> RunResult:
    times = {"ttft_s": 0.002, "slowdown": {"a3": 200.0}, "replies": SAME}
    run, _ = panel(*layers, spec={"policy": policy}, **{**times, **options})
    return await run.run("how much?")


def _third(result: RunResult) -> str:
    """How the slow proposer, which says something else, ended."""
    return next(record.state for record in result.agents if record.call == "1/a3")


def _skipped(result: RunResult) -> dict[str, str]:
    return {event.call: event.source for event in result.trace if isinstance(event, AgentSkipped)}


@pytest.mark.parametrize("streaming", ["barrier", "overlap", "staircase"])
async def test_proposers_that_are_still_at_it_are_cut_off_once_the_others_agree(streaming: str) -> None:
    result = await _run(3, policy={"early_exit": {}, "streaming": streaming})
    assert _third(result) == "cancelled" and "chief answers" in result.text


async def test_without_it_everybody_is_waited_for() -> None:
    assert _third(await _run(3, policy={})) == "finished"


async def test_layers_to_come_are_skipped_and_the_aggregator_is_not() -> None:
    result = await _run(3, 2, 2, policy={"early_exit": {}})
    assert _skipped(result) == {"2/a1": "1/a1", "2/a2": "1/a2", "3/a1": "2/a1", "3/a2": "2/a2"}
    assert [record.call for record in result.agents if record.state == "finished"] == ["1/a1", "1/a2", "answer"]
    assert "It is 42." in result.text


async def test_too_few_or_too_different_proposals_are_no_agreement() -> None:
    for early in ({"proposals": 3, "threshold": 1.0}, {"measure": "words", "threshold": 1.0, "proposals": 3}):
        result = await _run(3, 2, policy={"early_exit": early})
        assert not _skipped(result) and _third(result) == "finished"


async def test_a_lower_threshold_is_met_by_a_majority() -> None:
    assert _skipped(await _run(3, 2, policy={"early_exit": {"proposals": 3, "threshold": 0.6}}))


async def test_a_quorum_goes_first() -> None:
    assert _third(await _run(3, policy={"early_exit": {}, "quorum": 3})) == "finished"
