"""The gate's say in a request: who of each layer is asked, or that nobody else need be."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moa_ray.errors import MoARayError
from moa_ray.gates import Answer, Choice, Gate, Question
from moa_ray.graph import Call, Message
from moa_ray.graph.prompts import Prompt
from moa_ray.runtime.attempts import Caller
from moa_ray.runtime.events import GateDecided
from moa_ray.runtime.joins import Outcome
from moa_ray.runtime.plan import Plan


async def decide(gate: Gate, timeout_s: float, caller: Caller) -> tuple[Plan, Outcome | None]:
    """Let the gate look at a request.

    Args:
        gate: The gate.
        timeout_s: How long it may take, in seconds; then everybody answers, as when it fails.
        caller: Makes the calls that it wants; its plan is the whole panel's.

    Returns:
        What is to be asked, and the answer, if the gate has it already.
    """
    plan, journal = caller.plan, caller.journal
    started, ask, failed = journal.now, _Asking(caller), ""
    agents = tuple(dict.fromkeys(call.agent for call in plan.calls))
    choice = Choice({})
    try:
        async with asyncio.timeout(timeout_s):
            if random.random() < plan.graph.spec.gate.explore:
                choice = _drawn(agents)
            else:
                question = Question(plan.messages, agents, ask, frozenset(plan.options.extra))
                choice = _checked(await gate.choose(question))
    except TimeoutError:
        failed = f"no choice within {timeout_s:g} s"
    except MoARayError as error:
        failed = error.message
    except Exception as error:  # a plug-in may raise anything; a request does not fail for want of a gate
        failed = f"{type(error).__name__}: {error}"
    answer = ask.outcomes[choice.answer.call] if choice.answer else None
    chosen = plan
    if not failed and not answer:
        chosen = plan.alone(choice.alone) if choice.alone else plan.picked(choice.weights)
    journal.emit(
        GateDecided(
            journal.run,
            journal.now,
            plan.graph.spec.gate.kind,
            choice.weights,
            tuple(map(tuple, chosen.graph.spec.layers)) if chosen.calls and not answer else (),
            0 if answer else chosen.size,
            journal.now - started,
            choice.note,
            failed,
            choice.alone,
        )
    )
    return chosen, answer


def _drawn(agents: Sequence[str]) -> Choice:
    """Anybody, as equals: epsilon-greedy exploration (Sutton and Barto 2018, section 2.2)."""
    return Choice(dict.fromkeys(random.sample(agents, len(agents)), 1.0), note="explores")


def _checked(choice: Choice) -> Choice:
    bad = {agent: weight for agent, weight in choice.weights.items() if not (math.isfinite(weight) and weight >= 0)}
    if bad:
        raise ValueError(f"weights that are none: {bad}")
    return choice


class _Asking:
    """Makes a gate's calls, which belong to layer 0.

    Attributes:
        outcomes: What came of each, by the id of the call.
    """

    def __init__(self, caller: Caller) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._caller = caller
        self._asked: Counter[str] = Counter()

    async def __call__(
        self, agent: str, messages: tuple[Message, ...], *, samples: int = 1, logprobs: bool = False
    ) -> list[Answer]:
        extra = {"logprobs": True} if logprobs else {}
        asked = [self._ask(agent, messages, extra) for _ in range(samples)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(asking) for asking in asked]
        outcomes = [task.result() for task in tasks]
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        return [Answer(outcome.call.id, outcome.text, outcome.logprob) for outcome in outcomes]

    async def _ask(self, agent: str, messages: tuple[Message, ...], extra: Mapping[str, Any]) -> Outcome:
        spec = self._caller.plan.graph.spec
        self._asked[agent] += 1
        number = self._asked[agent]
        call = Call(f"gate/{agent}" + (f"#{number}" if number > 1 else ""), agent, 0, sample=number)
        prompt = Prompt(spec.agents[agent].system, messages, layout=spec.prompt)
        self.outcomes[call.id] = await self._caller.ask(call, prompt, extra=extra)
        return self.outcomes[call.id]
