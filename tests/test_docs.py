"""Every snippet of the README, of docs/ and of examples/ is executed here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from moa_ray.engines import registry
from moa_ray.engines.protocol import EngineRequest
from moa_ray.gates import Question
from moa_ray.gates import registry as gate_kinds
from moa_ray.gates.learned import outcomes
from moa_ray.graph import Graph, load, loads
from moa_ray.graph.dag import build
from tests.commands import ROOT, moa_ray
from tests.conftest import EXAMPLES, HTTP_PORT

README = ROOT / "README.md"
ENGINES = ROOT / "docs" / "engines.md"
SERVING = ROOT / "docs" / "serving.md"
GATES = ROOT / "docs" / "gates.md"
OPERATING = {"serve", "deploy", "status", "scale", "delete"}
CALLS = {"quickstart": 4, "four_by_three": 13, "together": 13, "self_moa": 5, "dag": 5, "cascade": 4, "experts": 3}


def snippets(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TOGETHER_API_KEY", "none")
    return lambda name: load(EXAMPLES / f"{name}.yaml")


def test_every_example_is_listed_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_an_example_is_valid_and_makes_its_number_of_calls(example: Any, name: str) -> None:
    graph: Graph = example(name)
    registry.check(graph)
    gate_kinds.check(graph)
    assert len(graph.calls) + (graph.answer is not None) == CALLS[name]


def brief(graph: Graph) -> Graph:
    """The same with short answers: what is asked here is that it runs, not what it says."""
    agents = {name: agent.model_copy(update={"max_tokens": 24}) for name, agent in graph.spec.agents.items()}
    return build(graph.spec.model_copy(update={"agents": agents}), graph.source)


@pytest.mark.parametrize("name", ["quickstart", "four_by_three", "self_moa", "dag"])
@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_cluster")
def test_an_example_runs_with_its_real_model(example: Any, name: str) -> None:
    from moa_ray import MoA

    with MoA(brief(example(name))) as moa:
        result = moa.run("What is water made of?")
    assert {record.state for record in result.agents} == {"finished"}
    assert len(result.agents) == CALLS[name]
    assert result.text.strip() and result.usage.completion_tokens > CALLS[name]


def test_the_yaml_of_the_readme_and_of_docs_is_valid() -> None:
    for path in (README, ENGINES, GATES, ROOT / "docs" / "streaming.md", ROOT / "docs" / "reliability.md"):
        for text in snippets(path, "yaml"):
            graph = loads(text, file=path.name)
            registry.check(graph)
            gate_kinds.check(graph)


def commands(path: Path) -> list[list[str]]:
    """The words behind every `$ moa-ray` of a page."""
    lines = [line for text in snippets(path, "console") for line in text.splitlines() if "$ moa-ray" in line]
    asked = (re.split(r" +#| > ", line.partition("$ moa-ray ")[2])[0] for line in lines)
    return [shlex.split(command.replace("…", "Why is the sky blue?")) for command in asked]


@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    brief = re.sub(r"max_tokens: \d+", "max_tokens: 24", snippets(README, "yaml")[0])
    (tmp_path / "panel.yaml").write_text(brief)
    found = [words for words in commands(README) if words[0] not in OPERATING]
    assert len(found) >= 7
    for words in found:
        done = moa_ray(*words, cwd=tmp_path, stdin="And why is grass green?\n")
        assert done.returncode == 0, f"{words}\n{done.stderr}"
        assert done.stdout.strip()


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("page", [README, SERVING], ids=lambda path: path.stem)
def test_the_commands_of_operators_run_in_their_order(page: Path, tmp_path: Path) -> None:
    import ray

    where = ("--address", str(ray.get_runtime_context().gcs_address))
    for name in ("panel", "other"):
        script = snippets(ENGINES, "yaml")[1].replace("rehearsal", name).replace("script:", "smol:")
        (tmp_path / f"{name}.yaml").write_text(script.replace("engine: script", "engine: smol"))
    found = [words for words in commands(page) if words[0] in OPERATING]
    assert {words[0] for words in found} == OPERATING
    for words in found:
        port = ("--port", str(HTTP_PORT)) if words[0] == "deploy" else ()
        if words[0] != "serve":  # tests/cli/test_serving.py has it, in the foreground, with its curl line
            done = moa_ray(*words, *where, *port, cwd=tmp_path)
            assert done.returncode == 0 and done.stdout.strip(), f"{words}\n{done.stderr}"


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_cluster")
def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    for text in snippets(README, "python"):
        exec(compile(text, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "answer" in printed and "max over mean load" in printed


async def test_the_engine_of_the_docs_works() -> None:
    names: dict[str, Any] = {}
    exec(compile(snippets(ENGINES, "python")[0], str(ENGINES), "exec"), names)
    engine = await names["Shout"].create("m", names["ShoutOptions"](marks=2), num_cpus=1)
    chunks = [c async for c in engine.stream(EngineRequest("r", ({"role": "user", "content": "why not"},)))]
    assert "".join(chunk.text for chunk in chunks) == "WHY NOT !!"


@pytest.mark.parametrize("kind", ["llamacpp", "moe", "openai", "scripted", "vllm"])
def test_every_key_of_an_engine_is_in_the_docs(kind: str) -> None:
    section = ENGINES.read_text().split(f"## `{kind}`")[1].split("\n## ")[0]
    options = registry.kind_of(loads(snippets(README, "yaml")[0]).engines["smol"].model_copy(update={"kind": kind}))
    assert {key for key in options.Options.model_fields if f"`{key}`" not in section} == set()


async def test_the_gate_of_the_docs_works() -> None:
    names: dict[str, Any] = {}
    exec(compile(snippets(GATES, "python")[0], str(GATES), "exec"), names)
    gate = names["ShortestName"].create(None, None)
    choice = await gate.choose(Question(({"role": "user", "content": "why"},), ("anna", "al")))
    assert choice.weights == {"anna": 0.25, "al": 0.5}


def test_the_outcome_of_the_docs_is_one(tmp_path: Path) -> None:
    (tmp_path / "outcomes.jsonl").write_text(snippets(GATES, "json")[0])
    known = outcomes.load(tmp_path / "outcomes.jsonl", ("coder", "poet"))
    assert known.rewards[:, :2].tolist() == [[1.0, 0.0]] and known.tokens.tolist() == [120.0, 180.0, 300.0]


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_cluster")
def test_a_cascade_asks_its_panel_only_where_the_cheap_agent_is_not_sure(example: Any) -> None:
    from moa_ray import MoA

    with MoA(example("cascade")) as moa:
        sure = moa.run("What is the capital of France?")
        unsure = moa.run("How should I cook pasta without water?")
    assert [record.call for record in sure.agents] == ["gate/quick"] and "Paris" in sure.text
    assert unsure.agents[0].call == "gate/quick" and len(unsure.agents) == 1 + CALLS["cascade"]
