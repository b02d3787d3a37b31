"""The walk through a graph: every call a task that waits for its inputs, and at the end the aggregator."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace

from moa_ray.engines.protocol import Engine, FinishReason
from moa_ray.errors import MoARayError
from moa_ray.graph import ANSWER, Call, aggregators
from moa_ray.graph.prompts import Prompt
from moa_ray.graph.spec import PluginAggregator, VoteAggregator
from moa_ray.runtime import choose
from moa_ray.runtime.attempts import WHOLE, Caller, Stage
from moa_ray.runtime.events import AgentSkipped, LayerStarted
from moa_ray.runtime.joins import Inputs, Joins, Outcome, texts_of
from moa_ray.runtime.modes import Modes
from moa_ray.runtime.overlap import Overlap
from moa_ray.runtime.staircase import Staircase


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request.

    Args:
        text: The answer.
        source: Id of the call whose text it is.
        finish_reason: Why that ended.
        note: What a reader should know of how it came about.
    """

    text: str
    source: str
    finish_reason: FinishReason | None
    note: str = ""


class Walk:
    """One request through a graph.

    Every call is a task that waits for its inputs, asks its engine, and ends in an `Outcome`.

    Args:
        caller: Makes the calls of a plan.
        engines: An engine for every name in the graph.
    """

    def __init__(self, caller: Caller, engines: Mapping[str, Engine]) -> None:
        plan, journal = caller.plan, caller.journal
        self._plan, self._journal, self._caller = plan, journal, caller
        self._joins = Joins(plan, journal.clock)
        self._modes = Modes(plan, journal, engines)
        self._overlap = Overlap(plan, journal, engines)
        self._staircase = Staircase(plan, journal, self._overlap, self._ask)
        self._layers_begun: set[int] = set()

    async def answer(self) -> Answer | MoARayError:
        """The answer, told to the journal as it is written; or why there is none."""
        plan, joins = self._plan, self._joins
        async with asyncio.TaskGroup() as group:
            for call in plan.calls:  # topological order: the inputs of a call are tasks already
                joins.open(group, call.inputs)
                joins.calls[call.id] = group.create_task(self._call(call))
            joins.open(group, plan.finals)
            result = await self._aggregate(plan.finals)
            joins.cancel()  # stragglers that nobody waits for
        return result

    async def _call(self, call: Call) -> Outcome:
        """One call, in the best mode that it can have; none where the request brought its text along."""
        if (text := self._plan.options.proposals.get(call.id)) is not None:
            return Outcome(call, text)
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
        return await self._ask(call, self._plan.prompt(call, texts_of(proposals)))

    def _skipped(self, call: Call, agreeing: list[Outcome]) -> Outcome:
        """One of the answers that agree, in place of a call; another one for each call of the layer."""
        siblings = [other.id for other in self._plan.calls if other.inputs == call.inputs]
        stands_in = agreeing[siblings.index(call.id) % len(agreeing)]
        engine = self._plan.graph.engine_of(call.agent)
        head = (self._journal.run, self._journal.now, call.id, call.agent, engine, call.layer, 1)
        self._journal.emit(AgentSkipped(*head, stands_in.call.id))
        return replace(stands_in, call=call)

    async def _ask(self, call: Call, prompt: Prompt, stage: Stage = WHOLE) -> Outcome:
        if call.layer not in self._layers_begun:
            self._layers_begun.add(call.layer)
            agents = self._plan.graph.agents_of_layer(call.layer)
            self._journal.emit(LayerStarted(self._journal.run, self._journal.now, call.layer, agents))
        return await self._caller.ask(call, prompt, stage)

    async def _aggregate(self, finals: Inputs) -> Answer | MoARayError:
        aggregator, call = self._plan.graph.spec.aggregator, self._plan.answer
        outcome = await self._call(call) if call is not None else None
        if outcome is not None and outcome.error is not None:
            return outcome.error
        if outcome is not None and self._plan.answers(outcome.call):
            return Answer(outcome.text, outcome.call.id, outcome.finish_reason)
        proposals = await self._joins.answers(finals)
        if isinstance(proposals, MoARayError):
            return proposals
        texts = [proposal.text for proposal in proposals]
        if outcome is not None:
            return self._take(proposals, *choose.picked(outcome.text, len(texts)))
        if isinstance(aggregator, PluginAggregator):
            return await self._made(aggregator, proposals)
        assert isinstance(aggregator, VoteAggregator)
        weights = self._plan.weights_of([proposal.call for proposal in proposals])
        return self._take(proposals, *choose.vote(texts, aggregator.vote, weights))

    async def _made(self, aggregator: PluginAggregator, proposals: list[Outcome]) -> Answer | MoARayError:
        """What a plug-in makes of the proposals."""
        try:
            texts = [proposal.text for proposal in proposals]
            made = await asyncio.to_thread(aggregators.aggregate, aggregator, texts)
        except MoARayError as error:
            return error
        if isinstance(made, int):
            return self._take(proposals, made, f"{aggregator.kind} took proposal {made + 1} of {len(proposals)}")
        self._journal.emit_answer(made)
        return Answer(made, ANSWER, "stop", f"{aggregator.kind} wrote it out of {len(proposals)} proposals")

    def _take(self, proposals: list[Outcome], index: int, note: str) -> Answer:
        chosen = proposals[index]
        self._journal.emit_answer(chosen.text)
        return Answer(chosen.text, chosen.call.id, chosen.finish_reason, note)
