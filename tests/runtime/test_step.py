"""One call of a graph alone, shown what the caller brings along: what other workflow engines build on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from moa_ray.engines import Sampling, Scripted
from moa_ray.errors import RequestError
from moa_ray.graph import ANSWER, from_dict
from moa_ray.runtime import RunFinished, Runner, RunOptions, RunStarted
from tests.runtime.panels import SHAPES, panel, runner

_ONE_LAYER = {**SHAPES["layers"], "layers": [["a", "b", "c"]]}
_GRAPHS: Mapping[str, Mapping[str, Any]] = {
    **SHAPES,
    "woven": {**_ONE_LAYER, "prompt": "woven"},
    "overlap": {**_ONE_LAYER, "policy": {"streaming": "overlap"}},
}


def _runner(kind: str) -> tuple[Runner, Scripted]:
    return runner(from_dict(_GRAPHS[kind]))


async def _step_by_step(run: Runner, question: str, sampling: Sampling) -> tuple[str, dict[str, str]]:
    texts: dict[str, str] = {}
    for call in run.graph.calls:
        shown = {name: texts[name] for name in reversed(call.inputs)}  # in whatever order they are brought
        result = await run.run(question, RunOptions(call=call.id, proposals=shown, sampling=sampling))
        texts[call.id] = result.text
    shown = {name: texts[name] for name in run.graph.finals}
    result = await run.run(question, RunOptions(call=ANSWER, proposals=shown, sampling=sampling))
    return result.text, texts


@pytest.mark.parametrize("kind", _GRAPHS)
@pytest.mark.parametrize("seed", [None, 7])
async def test_calls_made_one_by_one_ask_the_engines_the_same_and_answer_the_same_as_a_run(
    kind: str, seed: int | None
) -> None:
    whole, engine = _runner(kind)
    stepping, other = _runner(kind)
    sampling = Sampling(seed=seed)
    expected = await whole.run("What is 6 times 7?", RunOptions(sampling=sampling))
    answer, texts = await _step_by_step(stepping, "What is 6 times 7?", sampling)
    assert answer == expected.text
    assert texts == {call.call: call.text for call in expected.agents if call.call in texts}

    def asked(engine: Scripted) -> list[tuple[Any, ...]]:
        return sorted(((c.agent, str(c.messages), str(c.sampling)) for c in engine.calls), key=str)

    assert asked(engine) == asked(other)


async def test_a_step_is_one_call_in_the_account_and_the_events() -> None:
    run, engine = panel(2, 2)
    shown = {"1/a1": "one", "1/a2": "two"}
    events = [event async for event in run.stream("why?", RunOptions(call="2/a2", proposals=shown))]
    start, end = events[0], events[-1]
    assert isinstance(start, RunStarted) and isinstance(end, RunFinished)
    assert (start.calls, end.source, len(engine.calls)) == (1, "2/a2", 1)
    prompt = str(engine.calls[0].messages)
    assert prompt.index("one") < prompt.index("two")


async def test_a_step_may_be_shown_what_a_quorum_leaves() -> None:
    run, engine = panel(3, spec={"policy": {"quorum": 2}}, agents={"a3": {"required": True}})
    await run.run("why?", RunOptions(call="answer", proposals={"1/a1": "one", "1/a3": "three"}))
    with pytest.raises(RequestError, match=r"answer sees 3, with a quorum of 2"):
        await run.run("why?", RunOptions(call="answer", proposals={"1/a3": "three"}))
    with pytest.raises(RequestError, match=r"answer needs that of 1/a3"):
        await run.run("why?", RunOptions(call="answer", proposals={"1/a1": "one", "1/a2": "two"}))
    assert len(engine.calls) == 1


async def test_the_quorum_of_a_step_is_the_requests_own() -> None:
    run, engine = panel(3, spec={"policy": {"quorum": 2}})
    one = {"1/a1": "one"}
    await run.run("why?", RunOptions(call="answer", proposals=one, policy={"quorum": 1}))
    with pytest.raises(RequestError, match=r"answer sees 3, with a quorum of 3; 2 are too few"):
        await run.run("why?", RunOptions(call="answer", proposals=one | {"1/a2": "two"}, policy={"quorum": 3}))
    assert len(engine.calls) == 1


async def test_a_step_of_a_gated_graph_asks_no_gate() -> None:
    run, engine = panel(3, spec={"gate": {"kind": "random", "k": 1}})
    await run.run("why?", RunOptions(call="1/a3"))
    assert [call.agent for call in engine.calls] == ["a3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"call": "anser"}, r"(?s)panel has no call 'anser'.*did you mean 'answer'"),
        ({"call": "2/a1", "proposals": {"1/a1": "x", "2/a2": "y"}}, r"(?s)2/a1 does not see 2/a2.*it sees: 1/a1, 1/a2"),
        ({"call": "2/a1"}, r"2/a1 sees 2, with a quorum of 2"),
        ({"proposals": {"1/a1": "x"}}, r"(?s)for which call\?.*answer"),
        ({"call": "1/a1", "agent": "a1"}, r"either of the two"),
    ],
)
async def test_a_step_that_does_not_fit_the_graph_is_refused(options: dict[str, Any], message: str) -> None:
    run, engine = panel(2, 2, spec={"policy": {"quorum": 2}})
    with pytest.raises(RequestError, match=message):
        await run.run("why?", RunOptions(**options))
    assert not engine.calls
