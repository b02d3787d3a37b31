"""Choosing a panel: the paper's own choice from the paper's own numbers, planted pools, budgets, YAML."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moa_ray.errors import RequestError
from moa_ray.evaluate import report
from moa_ray.evaluate.cache import Cache
from moa_ray.evaluate.pool import Pool
from moa_ray.evaluate.tune import Budget, Measured, Panel, Tuned, choose
from moa_ray.graph import loads
from tests.evaluate.test_study import InProcess, task

# Length-controlled win rates on AlpacaEval 2.0 of Wang et al. 2024: Table 4, each model as the aggregator of all six
# and as the only proposer (six samples of it) of Qwen1.5-110B; Table 3, that aggregator with 1, 2, 3 and 6 models.
# Four and five lie between. Alone: Table 2a.
AGGREGATOR = {"qwen-110b": 61.3, "qwen-72b": 59.3, "wizardlm": 52.9, "llama": 45.0, "mixtral": 48.4, "dbrx": 41.5}
PROPOSER = {"qwen-110b": 56.7, "qwen-72b": 53.3, "wizardlm": 63.8, "llama": 60.6, "mixtral": 54.8, "dbrx": 55.1}
ALONE = {"qwen-110b": 43.9, "qwen-72b": 36.6, "wizardlm": 51.3, "llama": 34.4, "mixtral": 23.7, "dbrx": 25.4}
MODELS_OF_SEVERAL = {1: 47.8, 2: 58.8, 3: 58.0, 4: 59.1, 5: 60.2, 6: 61.3}
SAMPLES_OF_ONE = {1: 47.8, 2: 54.5, 3: 56.1, 4: 56.3, 5: 56.5, 6: 56.7}


async def in_the_paper(panel: Panel) -> Measured:
    proposers, chief = panel
    if chief is None:
        score = ALONE[proposers[0]]
    elif len(set(proposers)) == 6:
        score = AGGREGATOR[chief]
    elif len(set(proposers)) == 1 and len(proposers) > 1:
        score = PROPOSER[proposers[0]] * SAMPLES_OF_ONE[len(proposers)] / SAMPLES_OF_ONE[6]
    else:  # a model that stands there twice is a sample more, not a model more
        score = MODELS_OF_SEVERAL[len(set(proposers))]
    return Measured(np.full(10, score / 100), 1000.0 * (len(proposers) + (chief is not None)), 1.0)


async def test_from_the_papers_numbers_the_papers_panel_is_chosen() -> None:
    tuned = await choose(tuple(ALONE), in_the_paper)
    proposers, aggregator = tuned.panel
    assert aggregator == "qwen-110b" and sorted(proposers) == sorted(ALONE)
    assert max(tuned.roles, key=lambda model: tuned.roles[model].proposer) == "wizardlm"
    assert tuned.steps[0].panel == (("wizardlm",), None)  # the best model alone, an excellent proposer, no aggregator
    assert tuned.gain and tuned.gain.low == pytest.approx(0.613 - 0.513)


async def test_from_the_same_numbers_the_best_proposer_alone_is_chosen_where_it_may_propose_again() -> None:
    tuned = await choose(tuple(ALONE), in_the_paper, repeats=True)
    assert tuned.panel == (("wizardlm",) * 6, "qwen-110b")  # 63.8: what Li et al. 2025 found


async def test_under_a_budget_a_smaller_panel_or_one_model_is_chosen() -> None:
    tuned = await choose(tuple(ALONE), in_the_paper, budget=Budget(tokens=3000))
    assert len(tuned.panel[0]) == 2 and max(step.tokens for step in tuned.steps) <= 3000
    tuned = await choose(tuple(ALONE), in_the_paper, budget=Budget(tokens=1000))
    assert tuned.panel == (("wizardlm",), None) and tuned.gain is None
    with pytest.raises(RequestError, match="not even one model"):
        await choose(tuple(ALONE), in_the_paper, budget=Budget(seconds=0.5))


def planted(rights: dict[str, np.ndarray], needs: int) -> Any:
    """A panel is right where `needs` of its proposals are; a model alone where it is."""

    async def measure(panel: Panel) -> Measured:
        proposers, chief = panel
        votes = np.sum([rights[name] for name in proposers], axis=0)
        right = votes >= (needs if chief and len(proposers) >= needs else 1)
        return Measured(right.astype(float), 10.0 * len(proposers), float(len(proposers)))

    return measure


async def test_models_that_are_right_on_different_questions_are_put_together() -> None:
    draw = np.random.default_rng(0).random(400)
    rights = {"a": draw < 0.5, "twin": draw < 0.48, "other": draw > 0.55}
    tuned = await choose(("a", "twin", "other"), planted(rights, 1), most=4)
    assert set(tuned.panel[0]) == {"a", "other"} and tuned.gain and tuned.gain.low > 0.3


async def test_where_the_gain_does_not_hold_on_other_questions_no_panel_is_chosen() -> None:
    random = np.random.default_rng(1)
    best = random.random(200) < 0.8
    lucky = best.copy()
    lucky[::2] = True  # on the questions that choose
    lucky[1::2] &= random.random(100) < 0.9
    rights = {"best": best, "lucky": lucky & (random.random(200) < 0.99)}

    async def measure(panel: Panel) -> Measured:
        chief = panel[1]
        return Measured((rights["best"] if chief is None else rights["lucky"]).astype(float), 10.0, 1.0)

    tuned = await choose(("best", "also"), lambda panel: measure(panel))
    assert tuned.panel == (("best",), None) and tuned.gain is None
    assert tuned.steps[1].chosen_on > tuned.steps[0].chosen_on and tuned.steps[1].held_out < tuned.steps[0].held_out


POOL = """
version: 1
name: pool
engines:
  s: {kind: scripted, model: m, replies: {seven: "it is 7", eight: "it is 8", nine: "it is 9"}}
  remote: {kind: openai, model: x, base_url: "http://127.0.0.1:1/v1", api_key: "${POOL_KEY}"}
agents:
  seven: {engine: s, max_tokens: 20, fallbacks: [remote]}
  eight: {engine: s, max_tokens: 20, samples: 3}
  nine: {engine: {kind: scripted, model: own, reply: "it is 9"}}
layers: [[seven, eight, nine]]
aggregator: {vote: {extract: number}}
"""


async def tuned_pool(folder: Path, cache: Cache) -> tuple[Pool, Tuned, InProcess]:
    (folder / "pool.yaml").write_text(POOL)
    pool = Pool(folder / "pool.yaml", task(6))
    served = InProcess([pool.graph], cache)
    measure = functools.partial(pool.measure, served=served, concurrency=2, progress=lambda *_: None)
    return pool, await choose(pool.models, measure, most=2), served


async def test_a_pool_is_measured_in_each_role_and_the_choice_is_a_graph_with_its_secrets_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POOL_KEY", "hush")
    pool, tuned, _ = await tuned_pool(tmp_path, Cache(tmp_path / "cache"))
    assert tuned.panel == (("seven",), None)  # all of them can do no better
    assert pool.agreement == {"seven": 0.0, "eight": 0.0, "nine": 0.0}
    assert json.loads(json.dumps(tuned.to_json()))["roles"]["seven"]["alone"] == 1.0
    told = report.text(report.tuned(tuned, pool.agreement))
    assert "seven alone: no panel within the budget is better" in told

    for panel in (tuned.panel, (("seven", "nine", "seven"), "eight")):
        written = pool.written(panel)
        graph = loads(written)
        assert "${POOL_KEY}" in written and "hush" not in written and graph.spec.name == "pool"
    assert [call.id for call in graph.calls] == ["1/seven#1", "1/seven#2", "1/nine"]
    assert graph.answer and graph.answer.agent == "eight-aggregator"
    assert graph.spec.agents["eight-aggregator"].max_tokens == 20 and yaml.safe_load(written)["version"] == 1


async def test_choosing_again_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOL_KEY", "hush")
    _, first, _ = await tuned_pool(tmp_path, Cache(tmp_path / "cache"))
    again = Cache(tmp_path / "cache")
    _, second, served = await tuned_pool(tmp_path, again)
    assert (served.asked, again.puts) == (0, 0) and first == second


def test_a_pool_of_one_and_questions_without_references_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POOL_KEY", "hush")
    (tmp_path / "pool.yaml").write_text(POOL)
    with pytest.raises(RequestError, match="no references"):
        Pool(tmp_path / "pool.yaml", task(2, None))
    one = {"version": 1, "name": "one", "engines": {"s": {"kind": "scripted", "model": "m"}}}
    one |= {"agents": {"a": {"engine": "s"}}, "layers": [["a"]], "aggregator": "a"}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(one))
    with pytest.raises(RequestError, match="at least two"):
        Pool(tmp_path / "one.yaml", task(2))
