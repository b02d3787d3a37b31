"""Learned gates: trained on outcomes of agents with known skills, they choose the right ones."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moa_ray.errors import EngineUnavailable, SpecError
from moa_ray.gates import Question, registry
from moa_ray.gates.learned.file import GateFile, read
from moa_ray.gates.learned.kinds import LearnedOptions, path_of
from moa_ray.gates.learned.train import train
from moa_ray.graph import Graph, Message, from_dict, load
from tests.gates.learned.embedder import TOPICS, Endpoint, embedding

AGENTS = tuple(f"expert{n}" for n in range(len(TOPICS)))


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with embedding() as endpoint:
        yield endpoint


def graph(endpoint: Endpoint, file: Path, kind: str = "noisy_top_k", **options: Any) -> Graph:
    gate = {"kind": kind, "k": 2, "file": str(file), "embeddings": {"base_url": endpoint.url, "model": "e"}, **options}
    return from_dict(
        {
            "version": 1,
            "name": "panel",
            "engines": {"script": {"kind": "scripted", "model": "m"}},
            "agents": {name: {"engine": "script"} for name in (*AGENTS, "chief")},
            "layers": [list(AGENTS)],
            "aggregator": "chief",
            "gate": gate,
        }
    )


def questions(count: int, seed: int) -> list[tuple[str, int]]:
    dice = random.Random(seed)
    topics = [dice.randrange(len(TOPICS)) for _ in range(count)]
    return [(f"a question {dice.random()} of {TOPICS[topic]}", topic) for topic in topics]


def recorded(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def skilled(path: Path, count: int = 2000) -> Path:
    """Outcomes of agents each of whom knows one topic; half of them are judged."""
    dice = random.Random(1)
    lines: list[Mapping[str, Any]] = []
    for text, topic in questions(count, 2):
        rewards = {name: float(dice.random() < (0.9 if n == topic else 0.2)) for n, name in enumerate(AGENTS)}
        judged = dice.sample(AGENTS, 4)
        lines.append({"prompt": text, "rewards": {name: rewards[name] for name in judged}})
    return recorded(path, lines)


async def chosen(gate: Any, text: str, k: int = 2) -> list[str]:
    messages: tuple[Message, ...] = ({"role": "user", "content": text},)
    weights = (await gate.choose(Question(messages, AGENTS))).weights
    return sorted(weights, key=lambda name: -weights[name])[:k]


@pytest.mark.parametrize("kind", ["noisy_top_k", "knn"])
async def test_the_best_agent_of_questions_never_seen_is_among_the_two_chosen(
    endpoint: Endpoint, tmp_path: Path, kind: str
) -> None:
    bound = graph(endpoint, tmp_path / "gate.safetensors", kind)
    trained = await train(bound, skilled(tmp_path / "outcomes.jsonl"))
    trained.gate.write(tmp_path / "gate.safetensors")
    gate = registry.create(bound)
    asked = questions(200, 3)
    picks = await asyncio.gather(*(chosen(gate, text) for text, _ in asked))
    await gate.close()
    assert np.mean([AGENTS[topic] in pick for (_, topic), pick in zip(asked, picks, strict=True)]) >= 0.95
    assert max(endpoint.batches[-20:]) == 16  # questions that come together are embedded together


async def test_where_all_are_as_good_the_load_is_balanced(endpoint: Endpoint, tmp_path: Path) -> None:
    dice = random.Random(5)
    lines = [{"prompt": t, "rewards": {n: float(dice.random() < 0.5) for n in AGENTS}} for t, _ in questions(2000, 6)]
    trained = await train(graph(endpoint, tmp_path / "g"), recorded(tmp_path / "outcomes.jsonl", lines))
    assert max(trained.load.values()) / (2 / len(AGENTS)) <= 1.2


async def test_an_agent_that_costs_more_than_it_is_better_is_not_chosen(endpoint: Endpoint, tmp_path: Path) -> None:
    tokens = {name: 1000 if name == "expert0" else 10 for name in AGENTS}
    rewards = {name: 0.6 if name == "expert0" else 0.5 for name in AGENTS}
    lines = [{"prompt": text, "rewards": rewards, "tokens": tokens} for text, _ in questions(300, 7)]
    path = recorded(tmp_path / "outcomes.jsonl", lines)
    free = await train(graph(endpoint, tmp_path / "g", w_importance=0, w_load=0), path)
    dear = await train(graph(endpoint, tmp_path / "g", w_importance=0, w_load=0, cost_weight=0.5), path)
    assert free.load["expert0"] > 0.9 and dear.load["expert0"] < 0.1


async def test_a_budget_of_tokens_is_kept_by_the_least_weight_of_cost(endpoint: Endpoint, tmp_path: Path) -> None:
    dice = random.Random(8)
    lines: list[Mapping[str, Any]] = []
    for text, topic in questions(600, 9):
        rewards = {name: float(dice.random() < (0.9 if n == topic else 0.6)) for n, name in enumerate(AGENTS)}
        tokens = {name: 400 if n < 2 else 100 for n, name in enumerate(AGENTS)}
        lines.append({"prompt": text, "rewards": rewards, "tokens": tokens})
    path, bound = recorded(tmp_path / "o.jsonl", lines), graph(endpoint, tmp_path / "g", "knn")
    free, kept = await train(bound, path), await train(bound, path, budget=0.2)
    assert free.cost > 0.2 >= kept.cost > 0.14 and kept.cost_weight > free.cost_weight == 0
    with pytest.raises(SpecError, match="14% of the panel's tokens, more than the 10% allowed"):
        await train(bound, path, budget=0.1)


@pytest.mark.parametrize(("panel", "alone"), [(0.6, True), (0.95, False)])
async def test_solo_asks_the_best_agent_alone_where_the_panel_is_no_better(
    endpoint: Endpoint, tmp_path: Path, panel: float, alone: bool
) -> None:
    dice = random.Random(4)
    lines: list[Mapping[str, Any]] = []
    for text, _ in questions(600, 9):
        rewards = {name: float(dice.random() < (0.8 if name == "expert3" else 0.3)) for name in AGENTS}
        lines.append({"prompt": text, "rewards": rewards, "panel": float(dice.random() < panel)})
    bound = graph(endpoint, tmp_path / "g", "solo", k=None)
    trained = await train(bound, recorded(tmp_path / "o.jsonl", lines))
    trained.gate.write(tmp_path / "g")
    gate = registry.create(bound)
    for text, _ in questions(20, 10):
        choice = await gate.choose(Question(({"role": "user", "content": text},), AGENTS))
        assert choice.alone == ("expert3" if alone else "") and "the panel" in choice.note
    await gate.close()
    assert trained.cost == pytest.approx(1 / 8 if alone else 1)


async def test_solo_needs_answers_of_the_panel(endpoint: Endpoint, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no answer of the panel was judged"):
        await train(graph(endpoint, tmp_path / "g", "solo"), skilled(tmp_path / "o.jsonl", 50))


async def test_the_same_question_always_goes_to_the_same_agents(endpoint: Endpoint, tmp_path: Path) -> None:
    GateFile("noisy_top_k", AGENTS, "e", {"w_gate": np.zeros((33, len(AGENTS)), np.float32)}).write(tmp_path / "g")
    gate = registry.create(graph(endpoint, tmp_path / "g"))
    asked = [text for text, _ in questions(400, 11)]
    first = [await chosen(gate, text) for text in asked]
    assert [await chosen(gate, text) for text in asked[:20]] == first[:20]
    loads = [sum(name in pick for pick in first) for name in AGENTS]
    assert max(loads) / np.mean(loads) < 1.3  # who cannot be told apart takes turns
    await gate.close()


def test_a_file_for_another_graph_is_told_before_anything_starts(endpoint: Endpoint, tmp_path: Path) -> None:
    GateFile("noisy_top_k", ("a", "b"), "e", {"w_gate": np.zeros((33, 2), np.float32)}).write(tmp_path / "g")
    with pytest.raises(SpecError, match="was made for the agents a, b, not expert0"):
        registry.check(graph(endpoint, tmp_path / "g"))
    (tmp_path / "g").write_bytes(b"nothing")
    with pytest.raises(SpecError, match="cannot be read"):
        registry.check(graph(endpoint, tmp_path / "g"))
    (tmp_path / "g").unlink()
    registry.check(graph(endpoint, tmp_path / "g"))


def test_a_relative_file_lies_beside_its_spec(endpoint: Endpoint, tmp_path: Path) -> None:
    written = graph(endpoint, Path("below/g"), "knn").spec.model_dump(mode="json")
    (tmp_path / "spec.yaml").write_text(json.dumps(written))
    bound = load(tmp_path / "spec.yaml")
    assert path_of(bound, LearnedOptions.model_validate(bound.spec.gate.options)) == tmp_path / "below" / "g"


async def test_a_newer_file_is_taken_up_and_a_broken_one_is_not(endpoint: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "gate.safetensors"

    def write(best: int) -> None:
        w_gate = np.zeros((33, len(AGENTS)), np.float32)
        w_gate[-1, best] = 5.0
        GateFile("noisy_top_k", AGENTS, "e", {"w_gate": w_gate}).write(file)

    write(3)
    gate = registry.create(graph(endpoint, file))
    assert await chosen(gate, "why?", 1) == ["expert3"]
    write(6)
    assert await chosen(gate, "why?", 1) == ["expert6"]
    file.write_bytes(os.urandom(500))
    question = Question(({"role": "user", "content": "why?"},), AGENTS)
    choice = await gate.choose(question)
    assert max(choice.weights, key=lambda name: choice.weights[name]) == "expert6"
    assert "cannot be read" in choice.note and "the version before it is used" in choice.note
    write(1)
    assert not (await gate.choose(question)).note and await chosen(gate, "why?", 1) == ["expert1"]
    await gate.close()


async def test_an_embedder_that_is_out_of_order_is_an_error_that_the_runtime_passes_over(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    file = tmp_path / "g"
    GateFile("noisy_top_k", AGENTS, "e", {"w_gate": np.zeros((33, len(AGENTS)), np.float32)}).write(file)
    gate = registry.create(graph(endpoint, file))
    endpoint.broken = True
    with pytest.raises(EngineUnavailable, match="no embeddings from"):
        await chosen(gate, "why?")
    endpoint.broken = False
    assert len(await chosen(gate, "why?")) == 2
    await gate.close()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "x", "rewards": {"expert0": NaN}}', r"o.jsonl:2: "),
        ('{"prompt": "x", "rewards": {"expert0": 1.5}}', r"o.jsonl:2: rewards.expert0: .*less than or equal to 1"),
        ('{"prompt": "x", "rewards": {"expret0": 1}}', r"o.jsonl:2: no layer has an agent 'expret0'"),
        ('{"prompt": "x", "rewards": {}}', r"o.jsonl:2: .*give .rewards. of agents, or that of the .panel."),
        ('{"prompt": " ", "rewards": {"expert0": 1}}', r"o.jsonl:2: the prompt is empty"),
        ('{"rewards": {"expert0": 1}}', r'o.jsonl:2: .*give "prompt" or "messages"'),
        ("{", r"o.jsonl:2: .*JSON"),
        ("", r"no answer of the agent 'expert1' was judged"),
    ],
)
async def test_outcomes_that_are_none_are_told_by_their_line(
    endpoint: Endpoint, tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "o.jsonl"
    path.write_text('{"prompt": "x", "rewards": {"expert0": 1}}\n' + line)
    with pytest.raises(SpecError, match=reason):
        await train(graph(endpoint, tmp_path / "g"), path)


def test_a_file_of_another_graph_or_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "g"
    with pytest.raises(SpecError, match="there is no gate file"):
        read(file, "knn", AGENTS, "e")
    good = {"w_gate": np.zeros((33, 2), np.float32)}
    GateFile("noisy_top_k", ("a", "b"), "e", good).write(file)
    assert read(file, "noisy_top_k", ("a", "b"), "e").agents == ("a", "b")
    for kind, agents, embedding_model in (("knn", "ab", "e"), ("noisy_top_k", "abc", "e"), ("noisy_top_k", "ab", "f")):
        with pytest.raises(SpecError, match="was made for"):
            read(file, kind, tuple(agents), embedding_model)
    GateFile("noisy_top_k", ("a", "b"), "e", {"w_gate": np.full((3, 2), np.nan, np.float32)}).write(file)
    with pytest.raises(SpecError, match="numbers that are none"):
        read(file, "noisy_top_k", ("a", "b"), "e")


def test_a_learned_gate_without_k_is_refused(endpoint: Endpoint, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="needs k"):
        registry.check(graph(endpoint, tmp_path / "g", k=None))
