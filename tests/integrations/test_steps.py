from __future__ import annotations

import ast
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa_ray.client import Client
from moa_ray.graph import Graph, from_dict
from moa_ray.integrations import step_by_step
from tests.commands import ROOT
from tests.runtime.panels import panel
from tests.server.local import serving
from tests.test_docs import snippets


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


@pytest.mark.parametrize("engine", ["airflow", "langgraph", "prefect"])
def test_nothing_in_a_graph_becomes_code_of_its_file(engine: str) -> None:
    attack = "x\nraise SystemExit\n#"
    graph = panel(2)[0].graph
    gate = graph.spec.gate.model_copy(update={"kind": attack})
    graph = replace(graph, spec=graph.spec.model_copy(update={"gate": gate}))
    text = import_module(f"moa_ray.integrations.{engine}").source(graph, "http://127.0.0.1:8000/v1")
    assert "gate.kind" in text and "SystemExit" not in ast.unparse(ast.parse(text))


@pytest.mark.parametrize("layers", [(3,), (2, 1)])
def test_the_loop_of_the_docs_answers_as_a_whole_run_does(tmp_path: Path, layers: tuple[int, ...]) -> None:
    (snippet,) = snippets(ROOT / "docs" / "integrations.md", "python")
    names: dict[str, Any] = {}
    exec(compile(snippet, "integrations.md", "exec"), names)
    with serving(*layers, reply="{agent} read {prompt}") as served, Client(f"{served.url}/v1") as client:
        (path := tmp_path / "panel.yaml").write_text(yaml.safe_dump(written(panel(*layers)[0].graph)))
        assert names["answer"](path, "why?", client) == client.run("why?").text


def written(graph: Graph) -> dict[str, Any]:
    """The graph as its YAML holds it."""
    return graph.spec.model_dump(mode="json", exclude_defaults=True)
