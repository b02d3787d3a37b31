"""One request through one graph: walk it, make the answer, tell how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isinf

from moa_ray.engines.protocol import Engine, FinishReason
from moa_ray.errors import DeadlineExceeded, MoARayError
from moa_ray.graph import Call
from moa_ray.graph.prompts import Prompt
from moa_ray.graph.spec import VoteAggregator
from moa_ray.runtime import choose
from moa_ray.runtime.attempts import WHOLE, Caller, Stage
from moa_ray.runtime.events import AgentSkipped, LayerStarted, RunFinished, RunStarted
from moa_ray.runtime.health import Health
from moa_ray.runtime.joins import Inputs, Joins, Outcome
from moa_ray.runtime.journal import Journal
from moa_ray.runtime.modes import Modes
from moa_ray.runtime.overlap import Overlap
from moa_ray.runtime.plan import Plan
from moa_ray.runtime.staircase import Staircase


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
        self.journal = Journal(deltas=not isinf(plan.options.draft_flush_s))
        self._plan = plan
        self._deadline = self.journal.clock() + plan.policy.deadline_s
        self._caller = Caller(plan, self.journal, engines, health, self._deadline)
        self._joins = Joins(plan, self.journal.clock)
        self._modes = Modes(plan, self.journal, engines)
        self._overlap = Overlap(plan, self.journal, engines)
        self._staircase = Staircase(plan, self.journal, self._overlap, self._ask)
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
            result = await self._aggregate(finals)
            joins.cancel()  # stragglers that nobody waits for
        return result

    async def _call(self, call: Call) -> Outcome:
        """One call, in the best mode that it can have."""
        mode, inputs = await self._modes.of(call), self._joins.answers(call.inputs)
        if mode == "staircase":
            return await self._staircase.climb(call, inputs)
        if mode == "overlap":
            async with self._overlap.ahead(call):
                proposals = await inputs
        else:
            proposals = await inputs
        if isinstance(proposals, MoARayError):
            return Outcome(call, error=proposals)
        if call.inputs in self._joins.agreed and call is not self._plan.answer:
            return self._skipped(call, proposals)
        return await self._ask(call, self._plan.prompt(call, [outcome.text for outcome in proposals]))

    def _skipped(self, call: Call, agreeing: list[Outcome]) -> Outcome:
        """One of the answers that agree, in place of a call; another one for each call of the layer."""
        siblings = [other.id for other in self._plan.calls if other.inputs == call.inputs]
        stands_in = agreeing[siblings.index(call.id) % len(agreeing)]
        engine = self._plan.graph.engine_of(call.agent)
        head = (self.journal.run, self.journal.now, call.id, call.agent, engine, call.layer, 1)
        self.journal.emit(AgentSkipped(*head, stands_in.call.id))
        return replace(stands_in, call=call)

    async def _ask(self, call: Call, prompt: Prompt, stage: Stage = WHOLE) -> Outcome:
        if call.layer not in self._layers_begun:
            self._layers_begun.add(call.layer)
            agents = self._plan.graph.agents_of_layer(call.layer)
            self.journal.emit(LayerStarted(self.journal.run, self.journal.now, call.layer, agents))
        return await self._caller.ask(call, prompt, stage)

    async def _aggregate(self, finals: Inputs) -> _Answer | MoARayError:
        aggregator, call = self._plan.graph.spec.aggregator, self._plan.answer
        outcome = await self._call(call) if call is not None else None
        if outcome is not None and outcome.error is not None:
            return outcome.error
        if outcome is not None and self._plan.answers(outcome.call):
            return _Answer(outcome.text, outcome.call.id, outcome.finish_reason)
        proposals = await self._joins.answers(finals)
        if isinstance(proposals, MoARayError):
            return proposals
        texts = [proposal.text for proposal in proposals]
        if outcome is not None:
            return self._take(proposals, *choose.picked(outcome.text, len(texts)))
        assert isinstance(aggregator, VoteAggregator)
        return self._take(proposals, *choose.vote(texts, aggregator.vote))

    def _take(self, proposals: list[Outcome], index: int, note: str) -> _Answer:
        chosen = proposals[index]
        self.journal.emit_answer(chosen.text)
        return _Answer(chosen.text, chosen.call.id, chosen.finish_reason, note)
