"""Waiting for a set of calls: for all of them, or for a quorum and a grace.

In a layered graph there is one join a layer, in a free graph one for each distinct set of inputs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, isinf

from moa_ray.engines.protocol import FinishReason
from moa_ray.errors import MoARayError, QuorumNotMet
from moa_ray.graph import Call, agreement
from moa_ray.runtime.plan import Plan

Inputs = tuple[str, ...]
"""Ids of the calls that somebody waits for, in the user's order."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: with a text of so many tokens, or with an error.

    `logprob` is the mean log-probability of the tokens, where that was asked for and the engine tells it.
    """

    call: Call
    text: str = ""
    finish_reason: FinishReason | None = None
    error: MoARayError | None = None
    tokens: int = 0
    logprob: float | None = None


def texts_of(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """What was said, by the id of the call."""
    return {outcome.call.id: outcome.text for outcome in outcomes}


class Joins:
    """All calls of a run as tasks, and who waits for which.

    Args:
        plan: Who answers, and what it takes for a join to be done.
        clock: The loop's time.

    Attributes:
        calls: The task of each call; to be filled in topological order.
        agreed: Joins whose answers say the same, where the policy cares.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float]) -> None:
        self.calls: dict[str, asyncio.Task[Outcome]] = {}
        self.agreed: set[Inputs] = set()
        self._policy = plan.policy
        self._agents = {call.id: plan.graph.spec.agents[call.agent] for call in plan.calls}
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
        needed = min(self._policy.quorum, len(inputs))
        missing = self._required(inputs) - {outcome.call.id for outcome in answers}
        if len(answers) >= needed and not missing:
            return answers
        errors = {outcome.call: outcome.error for outcome in outcomes if outcome.error is not None}
        for error in errors.values():  # the layers above a failed one fail with its error
            if isinstance(error, QuorumNotMet):
                return error
        reasons = "; ".join(f"{call.id} ({type(error).__name__}: {error.message})" for call, error in errors.items())
        which = f"{needed} needed" if not missing else f"{', '.join(sorted(missing))} required"
        return QuorumNotMet(f"{len(answers)} of {len(inputs)} agents answered, {which}: {reasons}")

    def cancel(self) -> None:
        """Cut off whatever still runs."""
        for task in (*self.calls.values(), *self._joins.values()):
            task.cancel()

    async def _join(self, inputs: Inputs) -> list[Outcome]:
        """Outcomes of `inputs` in their order, those that were cut off left out."""
        tasks = {name: self.calls[name] for name in inputs}
        due: dict[str, float] = {}  # when a straggler is given up
        while waiting := {name for name, task in tasks.items() if not task.done()}:
            left = min((due.get(name, inf) for name in waiting), default=inf) - self._clock()
            timeout = None if isinf(left) else max(0.0, left)
            await asyncio.wait({tasks[n] for n in waiting}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            outcomes = {name: task.result() for name, task in tasks.items() if task.done()}
            if any(outcomes[name].error for name in self._required(inputs) & outcomes.keys()):
                due = dict.fromkeys(tasks, self._clock())  # nothing that the others say can help
            elif await self._agree([outcome for outcome in outcomes.values() if not outcome.error], inputs):
                due = dict.fromkeys(tasks, self._clock())
            elif not due and self._done({name for name, outcome in outcomes.items() if not outcome.error}, inputs):
                due = {name: self._clock() + self._patience_s(name) for name in tasks}
            for name in [name for name in tasks if name not in outcomes and due.get(name, inf) <= self._clock()]:
                self._release(tasks.pop(name), name, inputs)
        return [task.result() for task in tasks.values()]

    async def _agree(self, answers: list[Outcome], inputs: Inputs) -> bool:
        """Whether the answers so far say the same, and suffice, so that the policy wants no more of them."""
        early, enough = self._policy.early_exit, self._done({outcome.call.id for outcome in answers}, inputs)
        if early is None or not enough or len(answers) < early.proposals or inputs in self.agreed:
            return inputs in self.agreed
        measure = agreement.MEASURES.find(early.measure)
        if await asyncio.to_thread(measure, [outcome.text for outcome in answers]) >= early.threshold:
            self.agreed.add(inputs)
        return inputs in self.agreed

    def _required(self, inputs: Inputs) -> set[str]:
        return {name for name in inputs if self._agents[name].required}

    def _done(self, answered: set[str], inputs: Inputs) -> bool:
        """Whether those who have answered suffice."""
        return len(answered) >= min(self._policy.quorum, len(inputs)) and self._required(inputs) <= answered

    def _patience_s(self, name: str) -> float:
        """How long a call is waited for once the others suffice."""
        patience_s, grace_s = self._agents[name].patience_s, self._policy.grace_s
        return inf if grace_s is None else grace_s if patience_s is None else patience_s

    def _release(self, task: asyncio.Task[Outcome], name: str, inputs: Inputs) -> None:
        """Cut off a straggler, unless somebody else still waits for it."""
        if all(join.done() for other, join in self._joins.items() if name in other and other != inputs):
            task.cancel()
