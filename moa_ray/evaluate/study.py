"""One evaluation from end to end: the arms, their trials, the judges' view, the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moa_ray.errors import RequestError
from moa_ray.evaluate import judge, results, trials
from moa_ray.evaluate.arms import Arm, arms_of, self_consistency
from moa_ray.evaluate.judge import Preference
from moa_ray.evaluate.results import Results
from moa_ray.evaluate.served import Served
from moa_ray.evaluate.tasks import Task
from moa_ray.evaluate.trials import Trial, tokens_of
from moa_ray.graph import Graph

Progress = Callable[[str, int, int], None]
"""Told how far an arm is: its name, questions that ended, questions."""

_MOST_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Study:
    """What is to be found out.

    Args:
        task: The questions.
        graphs: The first is the one in question, the others are compared with it.
        alone: Whether each agent of the first graph is asked alone, too.
        equal_budget: Whether its best agent is asked as often as the graph's tokens allow (self-consistency).
        endpoints: Models elsewhere to compare with.
        judges: Who compares answers; needed where the task has no references.
        seed: Of sampling, for agents that have none.
    """

    task: Task
    graphs: Sequence[Graph]
    alone: bool = True
    equal_budget: bool = True
    endpoints: Sequence[Arm] = ()
    judges: Sequence[Arm] = ()
    seed: int = 0

    def arms(self) -> list[Arm]:
        """Everybody who answers, but for the one whose budget is not known yet.

        Raises:
            RequestError: If two have the same name.
        """
        whole, *members = arms_of(self.graphs[0], seed=self.seed)
        others = [arms_of(graph, seed=self.seed)[0] for graph in self.graphs[1:]]
        arms = [whole, *(members if self.alone else ()), *others, *self.endpoints]
        names = [arm.name for arm in arms]
        for name in names:
            if names.count(name) > 1:
                raise RequestError(f"two arms are called {name!r}", hint="give each graph a name of its own")
        return arms


async def carry_out(study: Study, served: Served, *, concurrency: int, progress: Progress) -> Results:
    """Ask every arm every question, and say what that came to.

    Raises:
        RequestError: If nobody could say which answers are right.
    """
    if study.task.scorer is None and not study.judges:
        hint = "give a judge (--judge), or references"
        raise RequestError(f"{study.task.name} has no references to score answers by", hint=hint)
    found: dict[str, list[Trial]] = {}

    async def ask(arm: Arm) -> None:
        found[arm.name] = await trials.run(
            arm, study.task, served, concurrency=concurrency, ended=counting(progress, arm.name, study.task)
        )

    arms = study.arms()
    members = {arm.name: arm for arm in arms if arm.agent and arm.graph is arms[0].graph}
    for arm in arms:
        await ask(arm)
    if study.equal_budget and members:
        best = max(members, key=lambda name: sum(trial.score or 0.0 for trial in found[name]))
        samples = round(tokens_of(found[arms[0].name]) / max(tokens_of(found[best]), 1.0))
        if samples > 1:
            await ask(self_consistency(members[best], min(samples, _MOST_SAMPLES), study.task.scorer))
    preferences: dict[str, list[Preference]] = {}
    if study.judges:
        first, *others = found
        for other in others:
            preferences[other] = await judge.compare(
                study.judges,
                study.task,
                found[first],
                found[other],
                served,
                concurrency=concurrency,
                ended=counting(progress, f"judges: {first} and {other}", study.task, 2 * len(study.judges)),
            )
    return results.results_of(study.task, found, preferences, list(members))


def counting(progress: Progress, name: str, task: Task, times: int = 1) -> Callable[[Trial], None]:
    """Tells `progress` of each trial that ends, of all questions so many times."""
    done = 0

    def ended(_: Trial) -> None:
        nonlocal done
        done += 1
        progress(name, done, times * len(task.items))

    return ended
