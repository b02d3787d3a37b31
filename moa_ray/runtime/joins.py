"""Waiting for a set of calls: for all of them, or for a quorum and a grace.

In a layered graph there is one join a layer, in a free graph one for each distinct set of inputs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isinf

from moa_ray.engines.protocol import FinishReason
from moa_ray.errors import MoARayError, QuorumNotMet
from moa_ray.graph import Call, Policy

Inputs = tuple[str, ...]
"""Ids of the calls that somebody waits for, in the user's order."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: with a text, or with an error."""

    call: Call
    text: str = ""
    finish_reason: FinishReason | None = None
    error: MoARayError | None = None


class Joins:
    """All calls of a run as tasks, and who waits for which.

    Args:
        policy: What it takes for a join to be done.
        clock: The loop's time.

    Attributes:
        calls: The task of each call; to be filled in topological order.
    """

    def __init__(self, policy: Policy, clock: Callable[[], float]) -> None:
        self.calls: dict[str, asyncio.Task[Outcome]] = {}
        self._policy = policy
        self._clock = clock
        self._joins: dict[Inputs, asyncio.Task[list[Outcome]]] = {}

    def open(self, group: asyncio.TaskGroup, inputs: Inputs) -> None:
        """Have a join for `inputs`, whose calls are tasks already."""
        if inputs not in self._joins:
            self._joins[inputs] = group.create_task(self._join(inputs))

    async def answers(self, inputs: Inputs) -> list[Outcome] | MoARayError:
        """The answers that the join of `inputs` gathered, or the error that says why there are too few."""
        join = self._joins[inputs]
        await asyncio.wait({join})  # unlike awaiting the task, this does not cancel it with us
        outcomes = join.result()
        answers = [outcome for outcome in outcomes if outcome.error is None]
        errors = {outcome.call: outcome.error for outcome in outcomes if outcome.error is not None}
        needed = min(self._policy.quorum, len(inputs))
        if len(answers) >= needed:
            return answers
        for error in errors.values():  # the layers above a failed one fail with its error
            if isinstance(error, QuorumNotMet):
                return error
        reasons = "; ".join(f"{call.id} ({type(error).__name__}: {error.message})" for call, error in errors.items())
        return QuorumNotMet(f"{len(answers)} of {len(inputs)} agents answered, {needed} needed: {reasons}")

    def cancel(self) -> None:
        """Cut off whatever still runs."""
        for task in (*self.calls.values(), *self._joins.values()):
            task.cancel()

    async def _join(self, inputs: Inputs) -> list[Outcome]:
        """Outcomes of `inputs` in their order, those that were cut off left out."""
        tasks = {self.calls[name]: name for name in inputs}
        pending = set(tasks)
        quorum = min(self._policy.quorum, len(inputs))
        give_up = inf
        while pending and (left := give_up - self._clock()) > 0:
            timeout = None if isinf(left) else left
            done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            answered = sum(task.result().error is None for task in tasks if task.done())
            if done and answered >= quorum and self._policy.grace_s is not None:
                give_up = min(give_up, self._clock() + self._policy.grace_s)
        for task in pending:
            self._release(task, tasks[task], inputs)
        return [task.result() for task in tasks if task not in pending]

    def _release(self, task: asyncio.Task[Outcome], name: str, inputs: Inputs) -> None:
        """Cut off a straggler, unless somebody else still waits for it."""
        if all(join.done() for other, join in self._joins.items() if name in other and other != inputs):
            task.cancel()
