"""One request: let the gate look at it, walk the graph, tell how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from math import isinf

from moa_ray.engines.protocol import Engine
from moa_ray.errors import DeadlineExceeded, MoARayError
from moa_ray.gates import Gate
from moa_ray.graph.spec import Price
from moa_ray.runtime import gated
from moa_ray.runtime.attempts import Caller
from moa_ray.runtime.events import RunFinished, RunStarted
from moa_ray.runtime.health import Health
from moa_ray.runtime.journal import Journal
from moa_ray.runtime.plan import Plan
from moa_ray.runtime.walk import Answer, Walk


class Run:
    """One request on its way.

    Args:
        plan: What is asked.
        engines: An engine for every name in the graph.
        health: What is known of them.
        gate: Who picks the agents, and the seconds that it may take; None where all of the plan's are asked.
    """

    def __init__(
        self, plan: Plan, engines: Mapping[str, Engine], health: Health, gate: tuple[Gate, float] | None = None
    ) -> None:
        self.journal = Journal(deltas=not isinf(plan.options.draft_flush_s))
        self._plan, self._engines, self._gate = plan, engines, gate
        deadline = self.journal.clock() + plan.policy.deadline_s
        self._caller = Caller(plan, self.journal, engines, health, deadline)

    async def execute(self) -> None:
        """Have the request answered; emit `run.finished`, and raise what made the run fail."""
        plan, journal = self._plan, self.journal
        engines = {name: {"kind": e.kind, "model": e.model} for name, e in plan.graph.engines.items()}
        prices = {name: _price(e.price) for name, e in plan.graph.engines.items() if e.price is not None}
        journal.emit(RunStarted(journal.run, 0.0, plan.graph.spec.name, plan.size, engines=engines, prices=prices))
        result: Answer | MoARayError
        try:
            async with asyncio.timeout_at(self._caller.deadline):
                result = await self._answer()
        except TimeoutError:
            result = DeadlineExceeded(
                f"the request did not finish within its deadline of {plan.policy.deadline_s:g} s",
                hint="raise policy.deadline_s, or lower max_tokens",
            )
        text = "".join(journal.answer) if isinstance(result, MoARayError) else result.text
        ledger = journal.ledger
        end = RunFinished(journal.run, journal.now, text, ledger.usage, journal.answer_ttft_s, dollars=ledger.dollars)
        if isinstance(result, MoARayError):
            journal.emit(replace(end, error=type(result).__name__, message=result.message))
            raise result
        journal.emit(replace(end, source=result.source, finish_reason=result.finish_reason, note=result.note))

    async def _answer(self) -> Answer | MoARayError:
        caller = self._caller
        if self._gate is not None and self._plan.calls and self._plan.options.call is None:
            plan, outcome = await gated.decide(*self._gate, caller)
            if outcome is not None:
                self.journal.emit_answer(outcome.text)
                return Answer(outcome.text, outcome.call.id, outcome.finish_reason)
            caller = replace(caller, plan=plan)
        return await Walk(caller, self._engines).answer()


def _price(price: Price) -> dict[str, float]:
    cached = price.prompt if price.cached is None else price.cached
    return {"prompt": price.prompt, "cached": cached, "completion": price.completion}
