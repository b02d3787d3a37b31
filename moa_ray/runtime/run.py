"""One request through one graph: walk it, make the answer, tell how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isinf

from moa_ray.engines.protocol import Engine, FinishReason
from moa_ray.errors import DeadlineExceeded, MoARayError
from moa_ray.graph import Call
from moa_ray.graph.spec import VoteAggregator
from moa_ray.runtime import choose
from moa_ray.runtime.attempts import Caller
from moa_ray.runtime.events import LayerStarted, RunFinished, RunStarted
from moa_ray.runtime.health import Health
from moa_ray.runtime.joins import Joins, Outcome
from moa_ray.runtime.journal import Journal
from moa_ray.runtime.modes import Modes
from moa_ray.runtime.overlap import Overlap
from moa_ray.runtime.plan import Plan


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the aggregator made of the last proposals."""

    text: str
    source: str
    finish_reason: FinishReason | None
    note: str = ""


class Run:
    """One request on its way.

    Every call is a task that waits for its inputs, asks its engine, and ends in an `Outcome`.

    Args:
        plan: What is asked.
        engines: An engine for every name in the graph.
        health: What is known of them.
    """

    def __init__(self, plan: Plan, engines: Mapping[str, Engine], health: Health) -> None:
        self.journal = Journal(deltas=not isinf(plan.options.draft_flush_s), gather_s=plan.options.gather_s)
        self._plan = plan
        self._deadline = self.journal.clock() + plan.policy.deadline_s
        self._caller = Caller(plan, self.journal, engines, health, self._deadline)
        self._joins = Joins(plan, self.journal.clock)
        self._modes = Modes(plan, self.journal, engines)
        self._overlap = Overlap(plan, self.journal, engines)
        self._layers_begun: set[int] = set()

    async def execute(self) -> None:
        """Walk the graph; emit `run.finished`, and raise what made the run fail."""
        plan, journal = self._plan, self.journal
        journal.emit(RunStarted(journal.run, 0.0, plan.graph.spec.name, plan.size))
        result: _Answer | MoARayError
        try:
            async with asyncio.timeout_at(self._deadline):
                result = await self._walk()
        except TimeoutError:
            result = DeadlineExceeded(
                f"the request did not finish within its deadline of {plan.policy.deadline_s:g} s",
                hint="raise policy.deadline_s, or lower max_tokens",
            )
        text = "".join(journal.answer) if isinstance(result, MoARayError) else result.text
        end = RunFinished(journal.run, journal.now, text, journal.ledger.usage, journal.answer_ttft_s)
        if isinstance(result, MoARayError):
            journal.emit(replace(end, error=type(result).__name__, message=result.message))
            raise result
        journal.emit(replace(end, source=result.source, finish_reason=result.finish_reason, note=result.note))

    async def _walk(self) -> _Answer | MoARayError:
        plan, joins = self._plan, self._joins
        async with asyncio.TaskGroup() as group:
            for call in plan.calls:  # topological order: the inputs of a call are tasks already
                joins.open(group, call.inputs)
                joins.calls[call.id] = group.create_task(self._call(call))
            finals = plan.graph.finals if plan.calls else ()
            joins.open(group, finals)
            proposals = await (self._inputs(plan.answer) if plan.answer else joins.answers(finals))
            if isinstance(proposals, MoARayError):
                result: _Answer | MoARayError = proposals
            else:
                result = await self._aggregate(proposals)
            joins.cancel()  # stragglers that nobody waits for
        return result

    async def _call(self, call: Call) -> Outcome:
        inputs = await self._inputs(call)
        if isinstance(inputs, MoARayError):
            return Outcome(call, error=inputs)
        return await self._ask(call, inputs)

    async def _inputs(self, call: Call) -> list[Outcome] | MoARayError:
        """The answers that `call` builds on; its prompt is warmed meanwhile, where that is wanted."""
        if await self._modes.of(call) == "barrier":
            return await self._joins.answers(call.inputs)
        async with self._overlap.ahead(call):
            return await self._joins.answers(call.inputs)

    async def _ask(self, call: Call, inputs: list[Outcome]) -> Outcome:
        if call.layer not in self._layers_begun:
            self._layers_begun.add(call.layer)
            agents = self._plan.graph.agents_of_layer(call.layer)
            self.journal.emit(LayerStarted(self.journal.run, self.journal.now, call.layer, agents))
        prompt = self._plan.prompt(call, [outcome.text for outcome in inputs])
        return await self._caller.ask(call, prompt)

    async def _aggregate(self, proposals: list[Outcome]) -> _Answer | MoARayError:
        texts = [outcome.text for outcome in proposals]
        aggregator, call = self._plan.graph.spec.aggregator, self._plan.answer
        if isinstance(aggregator, VoteAggregator) and self._plan.calls:
            return self._take(proposals, *choose.vote(texts, aggregator.vote))
        assert call is not None
        outcome = await self._ask(call, proposals)
        if outcome.error is not None:
            return outcome.error
        if self._plan.ranks(call):
            return self._take(proposals, *choose.picked(outcome.text, len(texts)))
        return _Answer(outcome.text, call.id, outcome.finish_reason)

    def _take(self, proposals: list[Outcome], index: int, note: str) -> _Answer:
        chosen = proposals[index]
        self.journal.emit_answer(chosen.text)
        return _Answer(chosen.text, chosen.call.id, chosen.finish_reason, note)
