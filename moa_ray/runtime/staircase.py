"""Staircase: a layer starts on the first chunks of the one before, and takes in newer text as it writes.

A call writes its text in stages. Each is asked with what there is of the proposals by then, and continues what the
stages before wrote. The last one begins when the join of the inputs is done: its prompt is that of `barrier`, with
every proposal complete, and it alone decides where the text ends (after Staircase Streaming, arXiv 2510.05059).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from math import ceil
from typing import Any

from moa_ray.errors import MoARayError
from moa_ray.graph import Call
from moa_ray.graph.prompts import Prompt
from moa_ray.runtime.attempts import Stage
from moa_ray.runtime.drafts import Draft
from moa_ray.runtime.joins import Outcome, texts_of
from moa_ray.runtime.journal import Journal
from moa_ray.runtime.overlap import Overlap
from moa_ray.runtime.plan import Plan

_LONGEST_STAGE = 4
"""In chunks: so much may a stage write that took long to begin."""

Ask = Callable[[Call, Prompt, Stage], Coroutine[Any, Any, Outcome]]
Inputs = list[Outcome] | MoARayError


class Staircase:
    """Writes the texts of one run in stages.

    Args:
        plan: What each call asks.
        journal: How far the proposals have come.
        overlap: Warms a prompt until its first stage.
        ask: Makes the call of a stage.
    """

    def __init__(self, plan: Plan, journal: Journal, overlap: Overlap, ask: Ask) -> None:
        self._plan = plan
        self._journal = journal
        self._overlap = overlap
        self._ask = ask
        self._chunk = plan.policy.chunk_tokens
        most = {call.id: plan.sampling(call).max_tokens or 0 for call in plan.calls}
        self._wanted = {name: plan.policy.patience * tokens for name, tokens in most.items()}

    async def climb(self, call: Call, inputs: Coroutine[Any, Any, Inputs]) -> Outcome:
        """One call, from the first chunks of what it builds on until its text is complete.

        Args:
            call: The call.
            inputs: The join of its inputs.
        """
        join = asyncio.ensure_future(inputs)
        try:
            async with self._overlap.ahead(call):
                await self._until(join, lambda: self._may_begin(call))
            begun = await self._early_stages(call, join)
            if isinstance(begun, Outcome):
                return begun
            proposals = await join
        finally:
            join.cancel()
        if isinstance(proposals, MoARayError):
            return Outcome(call, error=proposals)
        return await self._ask(call, self._plan.prompt(call, texts_of(proposals)), begun)

    async def _early_stages(self, call: Call, join: asyncio.Future[Inputs]) -> Stage | Outcome:
        """Every stage before `join` is done; returns the one to come, or the failure of one."""
        stage = Stage()
        while not join.done() and (room := self._room(call, stage)) > 0:
            seen = {name: draft.tokens for name, draft in self._drafts(call).items()}
            part = Stage(stage.number, stage.begun, stage.begun_tokens, min(room, self._length(call)))
            outcome = await self._write(call, part, join)
            if outcome is None:
                return stage
            if outcome.error is not None:
                return outcome
            stage = Stage(stage.number + 1, outcome.text, outcome.tokens)
            if outcome.finish_reason == "stop":  # on what it has seen; whether that is all, the last stage decides
                return stage
            await self._until(join, lambda seen=seen: self._chunks_in(call, seen))  # type: ignore[misc]
        return stage

    async def _write(self, call: Call, stage: Stage, join: asyncio.Future[Inputs]) -> Outcome | None:
        """One early stage; None if the join is done before there is a token of it, so that the last may begin."""
        asked = asyncio.ensure_future(self._ask(call, self._prompt(call), stage))
        try:
            await _first_of(asked, join)
            if not asked.done() and self._characters(call) <= len(stage.begun):
                return None
            return await asked
        finally:
            asked.cancel()
            await asyncio.wait({asked})

    async def _until(self, join: asyncio.Future[Inputs], holds: Callable[[], bool]) -> None:
        """Until `holds`, looked at with every piece of news of the drafts, or the join is done."""
        while not join.done():
            news = self._journal.drafts.news
            if holds():
                return
            told = asyncio.ensure_future(news.wait())
            try:
                await _first_of(told, join)
            finally:
                told.cancel()

    # ------------------------------------------------------------------ how far the inputs are

    def _drafts(self, call: Call) -> dict[str, Draft]:
        """What is being written of the inputs of `call`; those that are lost left out."""
        return {name: draft for name in call.inputs if not (draft := self._journal.drafts[name]).lost}

    def _prompt(self, call: Call) -> Prompt:
        drafts = self._drafts(call)
        prompt = self._plan.prompt(call, {name: draft.text for name, draft in drafts.items()})
        return prompt.so_far([draft.complete for draft in drafts.values()])

    def _may_begin(self, call: Call) -> bool:
        patient = not self._plan.answers(call) or all(
            draft.complete or draft.tokens >= self._wanted[name] for name, draft in self._drafts(call).items()
        )
        return patient and self._chunks_in(call, {}) and bool(self._prompt(call).proposals)

    def _chunks_in(self, call: Call, seen: dict[str, int]) -> bool:
        """Whether a quorum of the inputs is a chunk further than it was `seen`, or complete."""
        drafts = self._drafts(call).items()
        further = sum(draft.complete or draft.tokens >= seen.get(name, 0) + self._chunk for name, draft in drafts)
        return further >= min(self._plan.policy.quorum, len(call.inputs))

    # ------------------------------------------------------------------ how far the text is

    def _characters(self, call: Call) -> int:
        """Length of the text of `call` so far."""
        own = self._journal.answer if self._plan.answers(call) else [self._journal.drafts[call.id].text]
        return sum(map(len, own))

    def _room(self, call: Call, stage: Stage) -> int:
        """Tokens that may be written before the inputs are complete: some are kept for the last stage."""
        most = self._plan.sampling(call).max_tokens
        return sys.maxsize if most is None else most - min(self._chunk, (most + 1) // 2) - stage.begun_tokens

    def _length(self, call: Call) -> int:
        """Tokens of a stage: a chunk, or more where the one before took longer to begin than a chunk takes to write.

        So at most about half of the time goes into reading prompts, and a chain of stages is never much slower than
        one call.
        """
        before = self._journal.drafts[call.id].paused
        if before is None or before.usage.completion_tokens < 2:
            return self._chunk
        token_s = (before.seconds - before.ttft_s) / (before.usage.completion_tokens - 1)
        worthwhile = ceil(before.ttft_s / token_s) if token_s > 0 else 0
        return min(max(self._chunk, worthwhile), _LONGEST_STAGE * self._chunk)


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
