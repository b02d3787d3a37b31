from __future__ import annotations

from moa_ray.graph import from_dict
from moa_ray.integrations import step_by_step
from tests.runtime.panels import panel


def test_a_graph_is_one_step_a_call_each_after_what_it_is_shown_and_the_answer_last() -> None:
    steps, _ = step_by_step(panel(2, 1)[0].graph)
    assert [(step.id, step.agent, step.layer, step.inputs) for step in steps] == [
        ("1/a1", "a1", 1, ()),
        ("1/a2", "a2", 1, ()),
        ("2/a1", "a1", 2, ("1/a1", "1/a2")),
        ("answer", "chief", 3, ("2/a1",)),
    ]


def test_a_step_has_the_policys_quorum_retries_and_times() -> None:
    policy = {"quorum": 2, "retries": 3, "deadline_s": 90}
    agents = {"a1": {"required": True, "timeout_s": 7}}
    steps, _ = step_by_step(panel(3, spec={"policy": policy}, agents=agents)[0].graph)
    first, *_, answer = steps
    assert (first.timeout_s, first.retries, first.needed) == (7.0, 3, 0)
    assert (answer.timeout_s, answer.needed) == (90.0, 2) and answer.required == {"1/a1"}


def test_a_vote_is_a_step_without_an_agent() -> None:
    spec = {
        "version": 1,
        "name": "panel",
        "engines": {"script": {"kind": "scripted", "model": "script"}},
        "agents": {"a": {"engine": "script", "samples": 2}},
        "layers": [["a"]],
        "aggregator": {"vote": {"extract": "number"}},
    }
    *_, answer = step_by_step(from_dict(spec))[0]
    assert (answer.id, answer.agent, answer.inputs) == ("answer", "", ("1/a#1", "1/a#2"))


def test_what_failed_is_not_shown() -> None:
    *_, answer = step_by_step(panel(3)[0].graph)[0]
    assert answer.shown({"1/a3": "three", "1/a1": "one", "1/a2": None}) == {"1/a1": "one", "1/a3": "three"}
    assert list(answer.shown({"1/a3": "three", "1/a1": "one"})) == ["1/a1", "1/a3"]


def test_what_steps_cannot_express_is_told() -> None:
    spec = {"policy": {"streaming": "staircase", "grace_s": 2}, "gate": {"kind": "random", "k": 1}}
    _, lost = step_by_step(panel(2, spec=spec)[0].graph)
    assert [line.split(":")[0] for line in lost] == [
        "gate.kind",
        "policy.streaming",
        "policy.grace_s",
        "policy.deadline_s",
    ]
