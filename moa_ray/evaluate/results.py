"""What an evaluation comes to: figures of each arm with intervals, and whether the panel is worth it, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import isfinite, nan
from statistics import fmean, median
from typing import Any

import numpy as np

from moa_ray.evaluate import judge
from moa_ray.evaluate.judge import Preference
from moa_ray.evaluate.scorers import VOTES
from moa_ray.evaluate.statistics import Array, Interval, bootstrap, length_controlled, mcnemar, ratio
from moa_ray.evaluate.tasks import Task
from moa_ray.evaluate.trials import Trial, tokens_of
from moa_ray.graph import agreement
from moa_ray.runtime.choose import extract


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """One arm over all questions.

    Args:
        name: Its name.
        score: Mean score, with its interval; None without a scorer.
        failed: Questions that it failed on; they count as wrong.
        tokens: Of a question on average, prompt and completion.
        tokens_per_correct: Tokens of all questions over the sum of scores.
        ttft_s: Median, along the critical path.
        total_s: Median, along the critical path.
        by_category: Mean score of each category; empty without a scorer, or categories.
        by_layer: Mean score of what each layer's agents said.
    """

    name: str
    score: Interval | None
    failed: int
    tokens: float
    tokens_per_correct: Interval | None
    ttft_s: float | None
    total_s: float | None
    by_category: Mapping[str, float]
    by_layer: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The first arm beside another one, on the same questions.

    Args:
        arm: The other.
        difference: Of mean scores; None without a scorer.
        p: Of McNemar's exact test, where all scores are 0 or 1.
        win_rate: What judges say, ties as halves; None without a judge.
        win_rate_length_controlled: The same for answers of equal length.
        undecided: Questions, times judges, without a verdict; they count as ties.
        first_place: How often judges that were not of two minds preferred what was shown first; 0.5 is fair.
        tokens_ratio: Tokens of the first arm over the other's; NaN where that had none.
    """

    arm: str
    difference: Interval | None
    p: float | None
    win_rate: Interval | None
    win_rate_length_controlled: Interval | None
    undecided: int
    first_place: float | None
    tokens_ratio: float


@dataclass(frozen=True, slots=True)
class Results:
    """All of an evaluation.

    Args:
        task: The questions.
        arms: Figures of each arm, the one that is judged first.
        comparisons: It beside each of the others.
        agreement: Between agents that were asked the same, how far they said the same, from 0 to 1.
        verdict: Whether it is worth it, in words.
        trials: Everything, by arm.
    """

    task: Task
    arms: Sequence[ArmFigures]
    comparisons: Sequence[Comparison]
    agreement: Mapping[tuple[str, str], float]
    verdict: str
    trials: Mapping[str, Sequence[Trial]] = field(repr=False)


def results_of(
    task: Task,
    trials: Mapping[str, Sequence[Trial]],
    preferences: Mapping[str, Sequence[Preference]] | None = None,
    members: Sequence[str] = (),
) -> Results:
    """Figures of an evaluation.

    Args:
        task: The questions.
        trials: Of each arm, in the questions' order; the arm in question first.
        preferences: What judges say of it beside other arms, by the other's name.
        members: Arms that are agents of it: it is worth its tokens if it beats the best of them.
    """
    first, *others = trials
    preferences = preferences or {}
    comparisons = [_compare(trials[first], name, trials[name], preferences.get(name, ()), task) for name in others]
    return Results(
        task,
        [_figures(name, each, task) for name, each in trials.items()],
        comparisons,
        agreement_of(trials[first], task),
        _verdict(first, task, trials, comparisons, members),
        trials,
    )


def _scores(trials: Sequence[Trial]) -> Array:
    return np.array([trial.score or 0.0 for trial in trials])


def _figures(name: str, trials: Sequence[Trial], task: Task) -> ArmFigures:
    answered = [trial for trial in trials if not trial.error]
    tokens = np.array([trial.usage.prompt_tokens + trial.usage.completion_tokens for trial in trials], float)
    scored = task.scorer is not None
    categories: dict[str, list[float]] = {}
    layers: dict[str, list[float]] = {}
    for item, trial in zip(task.items, trials, strict=True):
        if item.category and trial.score is not None:
            categories.setdefault(item.category, []).append(trial.score)
        for said in trial.said:
            if said.score is not None:
                layers.setdefault("answer" if said.final else f"layer {said.layer}", []).append(said.score)
    firsts = [trial.ttft_s for trial in answered if trial.ttft_s is not None]
    return ArmFigures(
        name,
        bootstrap(_scores(trials)) if scored else None,
        len(trials) - len(answered),
        tokens_of(trials),
        bootstrap(np.stack([tokens, _scores(trials)], axis=1), ratio) if scored else None,
        median(firsts) if firsts else None,
        median(trial.total_s for trial in answered) if answered else None,
        {name: fmean(scores) for name, scores in categories.items()},
        {name: fmean(scores) for name, scores in layers.items()},
    )


def _compare(
    ours: Sequence[Trial], name: str, theirs: Sequence[Trial], preferences: Sequence[Preference], task: Task
) -> Comparison:
    one, other = _scores(ours), _scores(theirs)
    binary = task.scorer is not None and bool(np.isin(np.concatenate([one, other]), (0.0, 1.0)).all())
    judged = judge.together(preferences)
    worth = np.array([each for each, _ in judged])
    lengths = np.array([sizes for _, sizes in judged]).reshape(-1, 2)
    biased = [each for each in preferences if each.decided and each.shown_first != each.shown_second]
    likes_first = [float((each.shown_first or 0.0) > (each.shown_second or 0.0)) for each in biased]
    return Comparison(
        name,
        bootstrap(one - other) if task.scorer else None,
        mcnemar(one, other) if binary else None,
        bootstrap(worth) if judged else None,
        length_controlled(worth, lengths) if judged else None,
        sum(not each.decided for each in preferences),
        fmean(likes_first) if likes_first else None,
        tokens_of(ours) / tokens_of(theirs) if tokens_of(theirs) else nan,
    )


def agreement_of(trials: Sequence[Trial], task: Task) -> dict[tuple[str, str], float]:
    """How far each pair of agents of the first layer said the same, from 0 to 1: the less, the more diverse they are.

    By the part of an answer that the scorer looks at, where there is one, else by words in common.
    """
    part = VOTES.get(task.scorer or "")
    found: dict[tuple[str, str], list[float]] = {}
    for trial in trials:
        said = [each for each in trial.said if each.layer == 1 and not each.final and each.text]
        for one, other in combinations(sorted(said, key=lambda each: each.agent), 2):
            if one.turn != other.turn:
                continue
            if part is not None:
                same = extract(one.text, part)
                alike = float(same is not None and same == extract(other.text, part))
            else:
                alike = agreement.words([one.text, other.text])
            found.setdefault((one.agent, other.agent), []).append(alike)
    return {pair: fmean(alike) for pair, alike in found.items()}


# ---------------------------------------------------------------- in words


def _verdict(
    first: str,
    task: Task,
    trials: Mapping[str, Sequence[Trial]],
    comparisons: Sequence[Comparison],
    members: Sequence[str],
) -> str:
    rivals = [each for each in comparisons if each.arm in members] or list(comparisons)
    if not rivals:
        return f"{first} was compared with nothing"
    title = "its best member" if rivals[0].arm in members else "the best of the others"
    if task.scorer:
        return _verdict_of_scores(first, title, trials, rivals)
    best = min(rivals, key=lambda each: each.win_rate.estimate if each.win_rate else 1.0)
    return _verdict_of_judges(first, title, best)


def _verdict_of_scores(
    first: str, title: str, trials: Mapping[str, Sequence[Trial]], rivals: Sequence[Comparison]
) -> str:
    columns = np.stack([_scores(trials[first]), *(_scores(trials[each.arm]) for each in rivals)], axis=1)
    # The best member is found anew in each resample: that it is the best of several is luck in part.
    gain = bootstrap(columns, lambda means: means[:, 0] - means[:, 1:].max(axis=1))
    best = rivals[int(columns[:, 1:].mean(axis=0).argmax())]
    points = f"{_points(gain.low)} to {_points(gain.high)}"
    rival, cost = f"{title}, {best.arm}", f"at {best.tokens_ratio:.1f}x the tokens"
    if gain.low > 0:
        by = f"by {100 * gain.estimate:.1f} points, 95 % interval {points}"
        return f"{first} beats {rival}, {by}, {cost}"
    if gain.high < 0:
        by = f"by {-100 * gain.estimate:.1f} points, 95 % interval of the difference {points}"
        return f"not worth it: {first} is worse than {rival}, {by}, {cost}"
    return (
        f"not worth it, as far as {len(columns)} questions can tell: {first} scores {_points(gain.estimate)} points "
        f"beside {rival}, 95 % interval {points}, {cost}"
    )


def _verdict_of_judges(first: str, title: str, best: Comparison) -> str:
    rate, rival = best.win_rate_length_controlled, f"{title}, {best.arm}"
    assert rate is not None and best.win_rate is not None
    told = (
        f"a length-controlled win rate of {100 * rate.estimate:.1f} %, 95 % interval {100 * rate.low:.1f} to "
        f"{100 * rate.high:.1f} ({100 * best.win_rate.estimate:.1f} % as judged), "
        f"at {best.tokens_ratio:.1f}x the tokens"
    )
    if rate.low > 0.5:
        return f"{first} beats {rival}: {told}"
    if rate.high < 0.5:
        return f"not worth it: {first} is worse than {rival}: {told}"
    return f"not worth it, as far as the judges can tell: {first} beside {rival}, has {told}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def to_json(results: Results) -> dict[str, Any]:
    """Everything but the answers' drafts, as plain JSON."""

    def plain(value: Any) -> Any:
        match value:
            case Interval():
                return {name: plain(getattr(value, name)) for name in ("estimate", "low", "high")}
            case Mapping():
                return {name: plain(each) for name, each in value.items()}
            case float() if not isfinite(value):
                return None
            case _:
                return value

    def fields(value: ArmFigures | Comparison) -> dict[str, Any]:
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}

    return {
        "task": {"name": results.task.name, "questions": len(results.task.items), "scorer": results.task.scorer},
        "problems": list(results.task.problems),
        "arms": [fields(each) for each in results.arms],
        "comparisons": [fields(each) for each in results.comparisons],
        "agreement": [{"agents": list(pair), "agreement": alike} for pair, alike in results.agreement.items()],
        "verdict": results.verdict,
    }
