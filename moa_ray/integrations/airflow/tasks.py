"""A graph's steps as tasks of Airflow's: an agent of a layer is one task, mapped over its samples. Needs no Airflow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from moa_ray.integrations.steps import Step


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Args:
        name: Its id within its task group.
        layer: Layer from 1, the number of its group.
        calls: Ids of the calls that it is mapped over.
        step: One of its steps, which differ in nothing else.
    """

    name: str
    layer: int
    calls: tuple[str, ...]
    step: Step

    @property
    def spares(self) -> bool:
        """Whether it runs when some of the tasks before it have failed: where the quorum is less than all."""
        return self.step.needed < len(self.step.inputs)


def tasks_of(steps: Iterable[Step]) -> tuple[Task, ...]:
    """The tasks of `steps`, which stand in order with an agent's samples side by side, by layers; the answer last."""
    groups = [(node, tuple(group)) for node, group in groupby(steps, lambda step: node_of(step.id))]
    tasks = [
        Task(node.rpartition("/")[2], group[0].layer, tuple(step.id for step in group), group[0])
        for node, group in groups
    ]
    return tuple(sorted(tasks, key=lambda task: task.layer))


def node_of(call: str) -> str:
    """What the samples of one agent have in common: `1/skeptic` of `1/skeptic#2`."""
    return call.partition("#")[0]


def before(task: Task) -> tuple[str, ...]:
    """The nodes whose tasks it waits for, in the user's order."""
    return tuple(dict.fromkeys(node_of(call) for call in task.step.inputs))
