"""One call and its attempts. The retry loop in here is the only one in moa-ray."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from math import inf, isinf

from moa_ray.engines.protocol import Chunk, Engine, EngineRequest, FinishReason, Usage
from moa_ray.errors import EngineError, EngineTimeout, EngineUnavailable
from moa_ray.graph import Call
from moa_ray.runtime import context
from moa_ray.runtime.events import AgentCancelled, AgentDelta, AgentFailed, AgentFinished, AgentStarted
from moa_ray.runtime.joins import Outcome
from moa_ray.runtime.journal import Journal
from moa_ray.runtime.plan import Plan

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


@dataclass(slots=True)
class _Attempt:
    """What is known of a call in flight, for the event that ends it."""

    number: int
    started: float
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    ttft_s: float | None = None

    @property
    def usage(self) -> Usage:
        return Usage(completion_tokens=self.tokens)


class Caller:
    """Makes the calls of one run.

    Args:
        plan: What each call asks.
        journal: Where the calls tell what happens to them.
        engines: An engine for every name in the graph.
        deadline: When the run's time is up, by the journal's clock.
    """

    def __init__(self, plan: Plan, journal: Journal, engines: Mapping[str, Engine], deadline: float) -> None:
        self._plan = plan
        self._graph = plan.graph
        self._journal = journal
        self._engines = engines
        self._deadline = deadline
        self._clock = journal.clock

    async def ask(self, call: Call, proposals: Sequence[str]) -> Outcome:
        """One call with its retries, inside its share of the time that is left."""
        agent = self._graph.spec.agents[call.agent]
        stages_left = self._graph.depth + 2 - call.layer
        share_s = (self._deadline - self._clock()) / stages_left
        limit_s = min(agent.timeout_s or inf, share_s)
        current = _Attempt(1, self._clock())
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    try:
                        return await self._attempt(call, proposals, current)
                    except EngineError as error:
                        again = self._may_retry(call, current, error)
                        self._fail(call, current, error, will_retry=again)
                        if not again:
                            return Outcome(call, error=error)
                        await asyncio.sleep(_pause_s(current.number, error))
                        current = _Attempt(current.number + 1, self._clock())
        except TimeoutError:
            late = EngineTimeout(f"no complete answer within {limit_s:.3g} s", engine=self._graph.engine_of(call.agent))
            self._fail(call, current, late, will_retry=False)
            return Outcome(call, error=late)
        except asyncio.CancelledError:
            late_run = self._clock() >= self._deadline
            reason = "the request's deadline passed" if late_run else "not needed any more"
            seconds = self._clock() - current.started
            self._journal.emit(AgentCancelled(*self._head(call, current), reason, seconds, current.usage))
            raise

    async def _attempt(self, call: Call, proposals: Sequence[str], current: _Attempt) -> Outcome:
        engine = self._engines[self._graph.engine_of(call.agent)]
        options, is_answer = self._plan.options, self._plan.answers(call)
        flush_s = options.answer_flush_s if is_answer else options.draft_flush_s
        sampling = self._plan.sampling(call)
        info = await engine.info()
        prompt = self._plan.prompt(call, proposals)
        messages, trimmed = await context.fit(prompt, engine, info, sampling.max_tokens)
        self._journal.emit(AgentStarted(*self._head(call, current), len(proposals), trimmed))
        extra = options.extra if is_answer else {}
        request = EngineRequest(f"{self._journal.run}/{call.id}", messages, sampling, flush_s, call.agent, extra)
        async with aclosing(engine.stream(request)) as chunks:
            async for chunk in chunks:
                if chunk.text or chunk.tool_calls:
                    self._receive(call, current, chunk, is_answer, silent=isinf(flush_s))
                if chunk.finish_reason is not None:
                    return self._finish(call, current, chunk.usage, chunk.ttft_s, chunk.finish_reason)
        raise EngineUnavailable("the stream ended without saying why")

    def _receive(self, call: Call, current: _Attempt, chunk: Chunk, is_answer: bool, *, silent: bool) -> None:
        if current.ttft_s is None:
            current.ttft_s = self._clock() - current.started
        current.text.append(chunk.text)
        current.tokens += chunk.tokens
        if is_answer:
            self._journal.emit_answer(chunk.text, chunk.tool_calls)
        elif not silent:
            self._journal.emit(AgentDelta(*self._head(call, current), chunk.text, chunk.tokens))

    def _finish(
        self, call: Call, current: _Attempt, usage: Usage | None, ttft_s: float | None, reason: FinishReason
    ) -> Outcome:
        text = "".join(current.text)
        if not text.strip() and reason != "tool_calls":
            raise EngineUnavailable("the answer is empty")
        seconds = self._clock() - current.started
        # Where text was held back, only the engine knows when its first token came.
        first_s = ttft_s if ttft_s is not None else current.ttft_s
        self._journal.emit(
            AgentFinished(*self._head(call, current), text, usage or current.usage, seconds, first_s or seconds, reason)
        )
        return Outcome(call, text, reason)

    def _fail(self, call: Call, current: _Attempt, error: EngineError, *, will_retry: bool) -> None:
        seconds = self._clock() - current.started
        kind = type(error).__name__
        self._journal.emit(
            AgentFailed(*self._head(call, current), kind, error.message, will_retry, seconds, current.usage)
        )

    def _may_retry(self, call: Call, current: _Attempt, error: EngineError) -> bool:
        answer_begun = call is self._plan.answer and bool(self._journal.answer)
        return error.retryable and current.number <= self._plan.policy.retries and not answer_begun

    def _head(self, call: Call, current: _Attempt) -> tuple[str, float, str, str, str, int, int]:
        """The fields that every event of an agent starts with."""
        return (
            self._journal.run,
            self._journal.now,
            call.id,
            call.agent,
            self._graph.engine_of(call.agent),
            call.layer,
            current.number,
        )


def _pause_s(attempt: int, error: EngineError) -> float:
    """Exponential back-off with full jitter (Brooker 2015), or what the engine asked for."""
    if error.retry_after_s is not None:
        return error.retry_after_s
    return random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1)))
