"""Evaluations of panels of scripted agents: pairing, cache, failures, judges, planted effects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moa_ray.engines import Engine, registry
from moa_ray.engines.protocol import Usage
from moa_ray.errors import RequestError
from moa_ray.evaluate import judge, report, results
from moa_ray.evaluate.arms import Arm, arms_of, endpoint, self_consistency
from moa_ray.evaluate.cache import Cache
from moa_ray.evaluate.results import results_of
from moa_ray.evaluate.served import Served
from moa_ray.evaluate.study import Study, carry_out
from moa_ray.evaluate.tasks import Item, Task
from moa_ray.evaluate.trials import Trial
from moa_ray.graph import Graph, from_dict

REPLIES = {"right": "it is 7", "wrong": "it is 8", "chief": "7, surely"}


class Stopped(Exception):
    pass


def task(count: int, scorer: str | None = "number", **fields: Any) -> Task:
    items = [Item(f"q{n}", ({"role": "user", "content": f"question {n}"},), (), ("#### 7",)) for n in range(count)]
    return Task("sevens", tuple(items), scorer, **fields)


def panel(name: str = "panel", aggregator: Any = "chief", **engine: Any) -> Graph:
    return from_dict(
        {
            "version": 1,
            "name": name,
            "engines": {"s": {"kind": "scripted", "model": "m", "replies": REPLIES, **engine}},
            "agents": {
                "right": {"engine": "s", "max_tokens": 50},
                "wrong": {"engine": "s", "max_tokens": 50},
                **({"chief": {"engine": "s"}} if aggregator == "chief" else {}),
            },
            "layers": [["right", "wrong"]],
            "aggregator": aggregator,
            "policy": {"retries": 0},
        }
    )


class InProcess(Served):
    """The engines in this process, in place of actors."""

    asked = 0

    async def _start(self, name: str) -> Engine:
        self.asked += 1
        if name not in self._live:
            self._live[name] = await registry.create(self._specs[name])
        return self._live[name]


def served(cache: Cache, arms: Sequence[Arm]) -> InProcess:
    return InProcess([arm.graph for arm in arms], cache)


async def evaluate(study: Study, cache: Cache) -> results.Results:
    return await carry_out(
        study, served(cache, (*study.arms(), *study.judges)), concurrency=3, progress=lambda *_: None
    )


def by_name(found: results.Results) -> dict[str, results.ArmFigures]:
    return {arm.name: arm for arm in found.arms}


async def test_a_panel_is_compared_with_its_agents_and_with_the_best_one_at_equal_tokens(tmp_path: Path) -> None:
    found = await evaluate(Study(task(12), [panel()]), Cache(tmp_path))
    scores = {arm.name: arm.score.estimate for arm in found.arms if arm.score}
    *_, equal = found.arms
    assert scores == {"panel": 1.0, "panel/right": 1.0, "panel/wrong": 0.0, equal.name: 1.0}
    assert equal.name.startswith("panel/right x ") and equal.tokens == pytest.approx(found.arms[0].tokens, rel=0.1)
    assert found.agreement == {("right", "wrong"): 0.0}
    assert by_name(found)["panel"].by_layer == {"layer 1": 0.5, "answer": 1.0}
    assert found.verdict.startswith("not worth it, as far as 12 questions can tell: panel scores +0.0 points beside")


async def test_arms_are_paired_on_the_same_proposals_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    vote = panel("vote", {"vote": {"extract": "number"}})
    study = Study(task(5), [panel(), vote], equal_budget=False)
    found = await evaluate(study, cache)
    # panel: 2 proposals and an answer; its agents alone are those proposals, and so is the vote.
    calls = 5 * 3
    assert cache.puts == calls + 1  # and what the engine can do
    said = [[call.text for call in trial.said[:2]] for trial in found.trials["panel"]]
    assert said == [[call.text for call in trial.said] for trial in found.trials["vote"]]


async def test_a_finished_evaluation_starts_no_engine_when_it_is_run_again(tmp_path: Path) -> None:
    study = Study(task(6), [panel()])
    first = await evaluate(study, Cache(tmp_path))
    again = Cache(tmp_path)
    engines = served(again, study.arms())
    second = await carry_out(study, engines, concurrency=3, progress=lambda *_: None)
    assert (engines.asked, again.puts) == (0, 0)
    assert results.to_json(first) == results.to_json(second)


async def test_an_evaluation_that_was_cut_off_repeats_no_call(tmp_path: Path) -> None:
    study = Study(task(10), [panel()], equal_budget=False)
    cache = Cache(tmp_path)

    def stop(name: str, done: int, of: int) -> None:
        if (name, done) == ("panel", 4):
            raise Stopped

    with pytest.raises(Stopped):
        await carry_out(study, served(cache, study.arms()), concurrency=1, progress=stop)
    rest = Cache(tmp_path)
    await evaluate(study, rest)
    whole = Cache(tmp_path / "whole")
    await evaluate(study, whole)
    assert 0 < cache.puts < whole.puts and cache.puts + rest.puts == whole.puts


async def test_an_arm_that_fails_on_some_questions_fails_on_these_alone_and_is_told(tmp_path: Path) -> None:
    faults = [{"agent": "chief", "first": 2, "times": 2, "kind": "refused"}]
    found = await evaluate(Study(task(8), [panel(faults=faults)], equal_budget=False), Cache(tmp_path))
    figures = by_name(found)["panel"]
    assert figures.failed == 2 and figures.score and figures.score.estimate == 6 / 8
    assert len(found.trials["panel"]) == 8
    assert "panel failed on 2 questions, which count as wrong" in report.text(report.rendered(found))


async def test_times_are_those_of_the_critical_path_and_survive_the_cache(tmp_path: Path) -> None:
    study = Study(task(2), [panel(ttft_s=0.05, slowdown={"wrong": 3.0, "chief": 2.0})], equal_budget=False)
    for _ in range(2):
        arms = by_name(await evaluate(study, Cache(tmp_path)))
        assert arms["panel"].ttft_s == pytest.approx(0.15 + 0.10, abs=0.1)
        assert arms["panel/right"].ttft_s == pytest.approx(0.05, abs=0.04)
        assert (arms["panel"].total_s or 0) >= (arms["panel"].ttft_s or 0) > (arms["panel/right"].ttft_s or 0)


async def test_what_a_user_says_after_an_answer_is_asked_in_the_same_conversation(tmp_path: Path) -> None:
    item = Item("two", ({"role": "user", "content": "one"},), ("and then?",), ("7",))
    graph = panel(replies={}, reply="{prompt} 7")
    found = await evaluate(Study(Task("turns", (item,), "number"), [graph], equal_budget=False), Cache(tmp_path))
    (trial,) = found.trials["panel/right"]
    assert trial.answers == ("one 7", "and then? 7") and trial.score == 1.0


def test_names_that_stand_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="two arms are called 'panel'"):
        Study(task(1), [panel(), panel()]).arms()
    with pytest.raises(RequestError, match="is no endpoint"):
        endpoint("http://127.0.0.1:1/v1")


async def test_without_references_and_judges_nothing_is_asked(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(RequestError, match="no references"):
        await evaluate(Study(task(3, None), [panel()]), cache)
    assert cache.puts == 0


def test_self_consistency_without_a_part_to_vote_on_has_the_agent_itself_make_one_answer() -> None:
    _, right, _ = arms_of(panel(), seed=0)
    graph = self_consistency(right, 4, "exact").graph
    assert [call.id for call in graph.calls] == ["1/right#1", "1/right#2", "1/right#3", "1/right#4"]
    assert graph.answer and graph.answer.agent == "right-aggregator"


# ---------------------------------------------------------------- judges


def a_judge(reply: str, name: str = "judge") -> Arm:
    graph = {
        "version": 1,
        "name": name,
        "engines": {name: {"kind": "scripted", "model": "m", "reply": reply}},
        "agents": {name: {"engine": name}},
        "layers": [[name]],
        "aggregator": {"vote": {"extract": "last_line"}},
    }
    return arms_of(from_dict(graph), seed=0)[0]


def answered(arm: str, texts: Sequence[str]) -> list[Trial]:
    return [Trial(arm, f"q{n}", (text,) if text else (), None, Usage(10, 10), 0.1, 0.2) for n, text in enumerate(texts)]


async def judged(judges: Sequence[Arm], ours: Sequence[str], theirs: Sequence[str], folder: Path) -> Any:
    asked = task(len(ours), None)
    arms = {"ours": answered("ours", ours), "theirs": answered("theirs", theirs)}
    engines = served(Cache(folder), judges)
    said = await judge.compare(
        judges, asked, arms["ours"], arms["theirs"], engines, concurrency=2, ended=lambda _: None
    )
    return said, results_of(asked, arms, {"theirs": said}, ["theirs"])


async def test_a_judge_that_likes_the_first_place_comes_to_a_tie_and_is_seen_through(tmp_path: Path) -> None:
    said, found = await judged([a_judge("I prefer the first. [[A]]")], ["x"] * 9, ["y"] * 9, tmp_path)
    assert [each.worth for each in said] == [0.5] * 9
    (comparison,) = found.comparisons
    assert comparison.win_rate.estimate == 0.5 and comparison.first_place == 1.0 and comparison.undecided == 0
    assert "it liked the first 100 %" in report.text(report.rendered(found))


async def test_verdicts_that_are_none_count_as_ties_and_are_told(tmp_path: Path) -> None:
    judges = [a_judge("hm, both have merits"), a_judge("[[C]]", "fair")]
    said, found = await judged(judges, ["x"] * 4, ["y"] * 4, tmp_path)
    assert sum(not each.decided for each in said) == 4 and len(said) == 8
    assert found.comparisons[0].undecided == 4 and found.comparisons[0].win_rate.estimate == 0.5
    assert "4 times a judge gave no verdict, counted as a tie" in report.text(report.rendered(found))


async def test_an_arm_that_did_not_answer_has_lost_without_a_judge(tmp_path: Path) -> None:
    said, _ = await judged([a_judge("[[C]]")], ["x", "", ""], ["", "y", ""], tmp_path)
    assert [each.worth for each in said] == [1.0, 0.0, 0.5]


async def test_a_judge_that_likes_length_is_corrected_by_the_length_controlled_rate(tmp_path: Path) -> None:
    # The judge prefers the longer answer with some noise; ours are longer most of the time, and no better.
    random = np.random.default_rng(0)
    said = []
    for number in range(400):
        ours, theirs = int(random.normal(120, 40)), int(random.normal(100, 40))
        chance = 1 / (1 + np.exp(-2 * np.tanh((ours - theirs) / 57)))
        won = float(random.random() < chance)
        said.append(judge.Preference("j", f"q{number}", won, won, (ours, theirs)))
    arms = {"ours": answered("ours", ["x"] * 400), "theirs": answered("theirs", ["y"] * 400)}
    found = results_of(task(400, None), arms, {"theirs": said}, ["theirs"])
    comparison = found.comparisons[0]
    assert comparison.win_rate and comparison.win_rate.low > 0.5
    controlled = comparison.win_rate_length_controlled
    assert controlled and controlled.low < 0.5 < controlled.high
    assert found.verdict.startswith("not worth it, as far as the judges can tell")


# ---------------------------------------------------------------- the verdict


def planted(gain: float, items: int, seed: int) -> results.Results:
    """A panel that is right on a share `gain` more than the better of two members."""
    draw = np.random.default_rng(seed).random(items)
    rights = {
        "panel": (draw >= 0.05) & (draw < 0.55 + gain),
        "panel/a": draw < 0.5,
        "panel/b": (draw > 0.3) & (draw < 0.7),
    }
    arms = {
        name: [Trial(name, f"q{n}", ("x",), float(r), Usage(100, 10), 0.1, 0.2) for n, r in enumerate(right)]
        for name, right in rights.items()
    }
    return results_of(task(items), arms, members=["panel/a", "panel/b"])


def test_a_panel_that_is_better_by_10_points_is_called_so_and_one_that_is_not_is_not() -> None:
    found = [planted(0.10, 400, seed).verdict for seed in range(40)]
    assert sum(verdict.startswith("panel beats its best member, panel/a, by") for verdict in found) >= 36
    found = [planted(0.0, 400, seed).verdict for seed in range(40)]
    assert sum(verdict.startswith("panel beats") for verdict in found) <= 3
    found = [planted(-0.15, 400, seed).verdict for seed in range(20)]
    assert all(verdict.startswith("not worth it: panel is worse than its best member") for verdict in found)


def test_a_page_holds_all_of_it_and_needs_nothing_else() -> None:
    page = report.html(planted(0.1, 60, 0))
    assert page.count("<svg") == 1 and "panel/b" in page and "<script" not in page
    assert 'src="' not in page and "@import" not in page


def test_arms_that_are_never_right_or_never_answer_have_figures(tmp_path: Path) -> None:
    never = [Trial("never", f"q{n}", (), 0.0, Usage(5, 5), None, 0.0) for n in range(3)]
    ghost = [Trial("ghost", f"q{n}", (), 0.0, Usage(), None, 0.0, error="nobody there") for n in range(3)]
    found = results_of(task(3), {"never": never, "ghost": ghost})
    told = results.to_json(found)
    assert told["arms"][0]["tokens_per_correct"]["estimate"] is None
    assert told["comparisons"][0]["tokens_ratio"] is None
    assert "beside the best of the others, ghost" in found.verdict
    assert "ghost failed on 3 questions" in report.text(report.rendered(found))


async def test_agents_are_compared_within_one_turn(tmp_path: Path) -> None:
    item = Item("two", ({"role": "user", "content": "one"},), ("and then?",), ("7",))
    graph = panel(replies={}, reply="{prompt} 7")
    found = await evaluate(Study(Task("turns", (item,), "contains"), [graph], equal_budget=False), Cache(tmp_path))
    assert found.agreement == {("right", "wrong"): 1.0}
