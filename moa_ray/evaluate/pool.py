"""A pool of models to choose from, each measured in every role through the served path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import yaml

from moa_ray.errors import RequestError
from moa_ray.evaluate import trials
from moa_ray.evaluate.arms import Arm, arms_of
from moa_ray.evaluate.results import agreement_of
from moa_ray.evaluate.served import Served
from moa_ray.evaluate.study import Progress, counting
from moa_ray.evaluate.tasks import Task
from moa_ray.evaluate.trials import tokens_of
from moa_ray.evaluate.tune import Measured, Panel, spec_of
from moa_ray.graph import from_dict, load


class Pool:
    """The agents of a graph, taken apart; its layers do not count.

    Args:
        path: The graph's YAML file.
        task: Questions with references.
        seed: Of sampling, for agents that have none.

    Attributes:
        graph: The graph.
        models: Names of its agents.
        agreement: How far each agrees with the others on average, once all were asked the same.

    Raises:
        SpecError: If the file does not describe a graph.
        RequestError: If there is nothing to choose from, or to score by.
    """

    def __init__(self, path: Path, task: Task, *, seed: int = 0) -> None:
        self.graph = load(path)
        self.models = tuple(self.graph.spec.agents)
        if len(self.models) < 2:
            raise RequestError(f"{path}: a pool has at least two agents")
        if task.scorer is None:
            raise RequestError(f"{task.name} has no references to score answers by", hint="models are chosen by scores")
        self.agreement: Mapping[str, float] = {}
        self._written: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        self._task = task
        self._seed = seed

    def written(self, panel: Panel) -> str:
        """YAML of a panel, with the secrets' names as the pool has them."""
        return yaml.safe_dump(spec_of(self._written, panel), sort_keys=False, allow_unicode=True)

    async def measure(self, panel: Panel, served: Served, *, concurrency: int, progress: Progress) -> Measured:
        """Ask a panel, or one model alone, all questions."""
        proposers, chief = panel
        graph = from_dict(spec_of(self._written, panel))
        arm = arms_of(graph, seed=self._seed)[0 if chief else 1]
        name = proposers[0] if chief is None else f"{' + '.join(proposers)} > {chief}"
        found = await trials.run(
            Arm(name, arm.graph, arm.agent),
            self._task,
            served,
            concurrency=concurrency,
            ended=counting(progress, name, self._task),
        )
        if set(proposers) == set(self.models) and chief:
            alike = agreement_of(found, self._task)
            self.agreement = {
                model: fmean(value for pair, value in alike.items() if model in pair) for model in self.models
            }
        scores = np.array([trial.score or 0.0 for trial in found])
        return Measured(scores, tokens_of(found), median(trial.total_s for trial in found))
