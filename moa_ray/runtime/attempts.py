"""One call and its attempts: retried, continued, raced, sent to another engine. The only retry loop in moa-ray."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from moa_ray.engines.protocol import Chunk, Engine, EngineRequest, FinishReason
from moa_ray.errors import EngineError, EngineTimeout, EngineUnavailable
from moa_ray.graph import Call
from moa_ray.graph.prompts import Prompt
from moa_ray.runtime import context
from moa_ray.runtime.events import (
    AgentCancelled,
    AgentDelta,
    AgentFailed,
    AgentFinished,
    AgentPaused,
    AgentStarted,
)
from moa_ray.runtime.health import RETRY_SHARE, Health
from moa_ray.runtime.joins import Outcome
from moa_ray.runtime.journal import Journal
from moa_ray.runtime.plan import Plan
from moa_ray.runtime.race import Attempt, race

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_FIRST_TOKEN_THEN_ALL_S = 1e9
"""A `flush_s` that tells when an answer begins, and brings all the rest in one message."""

_TELLS_EVERY_S = 0.5
"""A `flush_s` for proposals that may be cut off once enough is there: what they had written stands in the account."""

_PIECE_TOKENS = 16
"""Of a proposal that others read while it is written, a message holds so many tokens, or a chunk's, if that is less."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The part of a text that is written on one prompt; all of it, where not said otherwise.

    Args:
        number: From 1.
        begun: What the stages before wrote.
        begun_tokens: Tokens of it.
        tokens: The most that this stage writes; None for the last, which writes the rest.
    """

    number: int = 1
    begun: str = ""
    begun_tokens: int = 0
    tokens: int | None = None


WHOLE = Stage()


@dataclass(frozen=True, slots=True)
class Caller:
    """Makes the calls of one run.

    Args:
        plan: What each call asks.
        journal: Where the calls tell what happens to them.
        engines: An engine for every name in the graph.
        health: What is known of them.
        deadline: When the run's time is up, by the journal's clock.
    """

    plan: Plan
    journal: Journal
    engines: Mapping[str, Engine]
    health: Health
    deadline: float

    async def ask(
        self, call: Call, prompt: Prompt, stage: Stage = WHOLE, extra: Mapping[str, Any] | None = None
    ) -> Outcome:
        """One call with its attempts, inside its share of the time that is left.

        Args:
            call: Who is asked.
            prompt: What.
            stage: Which part of the text is wanted.
            extra: Further fields for the engine, in OpenAI's words; where not given, the answer's are the request's.

        Returns:
            The text up to the end of the stage, or why it could not be had.
        """
        return await _Asking(self, call, prompt, stage, extra).outcome()


class _Asking:
    """One call on its way to an outcome."""

    def __init__(
        self, caller: Caller, call: Call, prompt: Prompt, stage: Stage, extra: Mapping[str, Any] | None
    ) -> None:
        self._plan, self._journal = caller.plan, caller.journal
        self._clock = caller.journal.clock
        self._deadline = caller.deadline
        self._engines, self._health = caller.engines, caller.health
        self._call, self._prompt, self._stage = call, prompt, stage
        self._agent = self._plan.graph.spec.agents[call.agent]
        self._is_answer = self._plan.answers(call)
        options = self._plan.options
        self._flush_s = options.answer_flush_s if self._is_answer else options.draft_flush_s
        policy = self._plan.policy
        may_be_cut = any(each is not None for each in (policy.grace_s, policy.layer_deadline_s, policy.early_exit))
        if may_be_cut and not self._is_answer:
            self._flush_s = min(self._flush_s, _TELLS_EVERY_S)
        read_meanwhile = not self._is_answer and policy.streaming != "barrier"
        self._flush_tokens = min(_PIECE_TOKENS, policy.chunk_tokens) if read_meanwhile else None
        self._engine = self._plan.graph.engine_of(call.agent)
        self._fallbacks = list(self._agent.fallbacks)
        self._retries = 0  # of the engine that is asked now
        self._number = 0
        self._flying: list[Attempt] = []
        self._failed_on: set[str] = set()  # replicas
        self._text = [stage.begun] if stage.begun else []
        self._tokens = stage.begun_tokens
        self._has_tool_calls = False
        self._extra = extra if extra is not None else options.extra if self._is_answer else {}
        self._logprob: float | None = None

    async def outcome(self) -> Outcome:
        """Ask until there is an answer, nothing more to try, or no time left."""
        limit_s = self._limit_s()
        self._gives_up = self._clock() + limit_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._until_answered()
        except TimeoutError:
            late = EngineTimeout(f"no complete answer within {limit_s:.3g} s", engine=self._engine)
            for attempt in [*self._flying]:
                self._book(attempt, late)
                self._fail(attempt, late, will_retry=False)
            return Outcome(self._call, error=late)
        except asyncio.CancelledError:
            late_run = self._clock() >= self._deadline
            for attempt in [*self._flying]:
                self._cut_off(attempt, "the request's deadline passed" if late_run else "not needed any more")
            raise

    def _limit_s(self) -> float:
        last = self._call is self._plan.answer
        stages_left = 1 if last else self._plan.graph.depth + 2 - self._call.layer
        share_s = (self._deadline - self._clock()) / stages_left
        layer_s = self._plan.policy.layer_deadline_s if not last else None
        return min(self._agent.timeout_s or inf, layer_s or inf, share_s)

    async def _until_answered(self) -> Outcome:
        while True:
            attempt = self._new_attempt()
            if not await self._admit(attempt):
                error: EngineError = EngineUnavailable(
                    f"{self._engine} failed too often, and is left alone for a while"
                )
                self._fail(attempt, error, will_retry=False)
                return Outcome(self._call, error=error)
            try:
                return await self._answer(attempt)
            except EngineError as caught:
                error = caught
            (attempt,) = self._flying  # of two, the last one that failed
            self._book(attempt, error)
            pause_s = await self._pause_s(error)
            self._fail(attempt, error, will_retry=pause_s is not None)
            if pause_s is None:
                return Outcome(self._call, error=error)
            await asyncio.sleep(pause_s)

    # ------------------------------------------------------------------ where to go on

    async def _admit(self, attempt: Attempt) -> bool:
        """Whether the engine's breaker lets the attempt pass, or that of a fallback."""
        while not self._health[self._engine].admit(self._clock()):
            if not await self._fall_back():
                return False
            attempt.engine = self._engine
        return True

    async def _pause_s(self, error: EngineError) -> float | None:
        """Seconds until the next attempt, on the same engine or on a fallback; None if there is to be none."""
        health = self._health[self._engine]
        if error.retryable and self._retries < self._plan.policy.retries and await self._can_go_on(self._engine):
            pause_s = _back_off_s(self._retries, error)
            in_time = self._clock() + pause_s < self._gives_up
            if in_time and not health.is_open and health.retries.spend():
                self._retries += 1
                return pause_s
        return 0.0 if await self._fall_back() else None

    async def _fall_back(self) -> bool:
        """Turn to the next engine that can take over, if there is one."""
        while self._fallbacks:
            name = self._fallbacks.pop(0)
            if await self._can_go_on(name):
                self._engine, self._retries = name, 0
                return True
        return False

    async def _can_go_on(self, engine: str) -> bool:
        """Whether `engine` can take over what there is of the answer."""
        if not (self._is_answer and self._text):
            return True
        return not self._has_tool_calls and (await self._engines[engine].info()).continues

    # ------------------------------------------------------------------ one attempt

    async def _answer(self, attempt: Attempt) -> Outcome:
        await self._send(attempt)
        async with aclosing(self._pieces(attempt)) as pieces:
            async for source, piece in pieces:
                if piece.text or piece.tool_calls:
                    self._receive(source, piece)
                if piece.finish_reason is not None:
                    return self._finish(source, piece, piece.finish_reason)
        raise AssertionError("the last piece has a finish reason")

    def _new_attempt(self) -> Attempt:
        self._number += 1
        attempt = Attempt(self._number, self._engine, self._clock())
        self._flying.append(attempt)
        return attempt

    async def _send(self, attempt: Attempt, *, hedge: bool = False, avoid: frozenset[str] = frozenset()) -> None:
        engine = self._engines[attempt.engine]
        info = await engine.info()
        if not info.continues:
            self._text.clear()
            self._tokens = 0
        begun = "".join(self._text)
        sampling = self._plan.sampling(self._call)
        messages, trimmed = await context.fit(self._prompt, engine, info, sampling.max_tokens)
        if (left := self._tokens_left(sampling.max_tokens)) is not None:
            sampling = replace(sampling, max_tokens=left)
        shown, stage = len(self._prompt.proposals), self._stage.number
        self._journal.emit(AgentStarted(*self._head(attempt), shown, trimmed, len(begun), hedge, stage))
        request = EngineRequest(
            f"{self._journal.run}/{self._call.id}/{attempt.number}",
            messages,
            sampling,
            self._flush_s if self._hedge_after_s() is None else min(self._flush_s, _FIRST_TOKEN_THEN_ALL_S),
            self._call.agent,
            self._extra,
            continue_from=begun,
            affinity=self._plan.affinity(self._call),
            avoid=avoid | self._failed_on,
            flush_tokens=self._flush_tokens,
        )
        attempt.chunks = engine.stream(request)

    def _tokens_left(self, max_tokens: int | None) -> int | None:
        """The most that may still be written; None where nothing bounds it."""
        stage = self._stage
        ends = [max_tokens, None if stage.tokens is None else stage.begun_tokens + stage.tokens]
        return max(1, min(end for end in ends if end is not None) - self._tokens) if any(ends) else None

    async def _pieces(self, attempt: Attempt) -> AsyncGenerator[tuple[Attempt, Chunk], None]:
        """Pieces of the answer, each with the attempt that it came by."""
        after_s, hedge = self._hedge_after_s(), self._plan.policy.hedge
        health = self._health[attempt.engine]
        health.retries.earn(RETRY_SHARE)
        health.hedges.earn(hedge.budget if hedge else 0)
        if after_s is None:
            async with aclosing(attempt.pieces()) as pieces:
                async for piece in pieces:
                    yield attempt, piece
            return

        async def rival() -> Attempt | None:
            if not health.hedges.spend():
                return None
            second = self._new_attempt()
            try:
                await self._send(second, hedge=True, avoid=frozenset({attempt.replica}))
            except EngineError as error:
                lost(second, error)
                return None
            return second

        def lost(loser: Attempt, error: EngineError | None) -> None:
            if error is None:
                self._cut_off(loser, "another replica was faster to begin")
            else:
                self._book(loser, error)
                self._fail(loser, error, will_retry=True)

        async with aclosing(race(attempt, after_s, rival, lost)) as pieces_of_winner:
            async for source, piece in pieces_of_winner:
                yield source, piece

    def _hedge_after_s(self) -> float | None:
        """How long the engine may take to begin before another replica is asked; None for ever."""
        hedge, spec = self._plan.policy.hedge, self._plan.graph.engines[self._engine]
        if hedge is None or spec.most_replicas < 2:
            return None
        return self._health[self._engine].ttft_percentile(int(hedge.after.removeprefix("p")))

    # ------------------------------------------------------------------ what is told of it

    def _receive(self, attempt: Attempt, piece: Chunk) -> None:
        if attempt.ttft_s is None:
            attempt.ttft_s = self._clock() - attempt.started
        attempt.tokens += piece.tokens
        attempt.received += 1
        self._tokens += piece.tokens
        self._text.append(piece.text)
        self._has_tool_calls |= bool(piece.tool_calls)
        if piece.logprob is not None:
            self._logprob = (self._logprob or 0.0) + piece.logprob
        if self._is_answer:
            self._journal.emit_answer(piece.text, piece.tool_calls)
        else:
            self._journal.emit(AgentDelta(*self._head(attempt), piece.text, piece.tokens))

    def _finish(self, attempt: Attempt, last: Chunk, reason: FinishReason) -> Outcome:
        text, usage = "".join(self._text), last.usage or attempt.usage
        if not text.strip() and reason != "tool_calls":
            raise EngineUnavailable("the answer is empty")
        seconds = self._clock() - attempt.started
        # Where text was held back, only the engine knows when its first token came.
        first_s = (last.ttft_s if last.ttft_s is not None else attempt.ttft_s) or seconds
        self._flying.remove(attempt)
        self._health[attempt.engine].succeeded(first_s)
        head = self._head(attempt)
        if self._stage.tokens is None:
            seen = attempt.received > 1 or last.ttft_s is not None  # else it came whole, and nobody knows since when
            itl_s = (seconds - first_s) / (attempt.tokens - 1) if seen and attempt.tokens > 1 else None
            self._journal.emit(AgentFinished(*head, text, usage, seconds, first_s, reason, last.prefill_s, itl_s))
        else:
            self._journal.emit(AgentPaused(*head, usage, seconds, first_s, last.prefill_s))
        logprob = None if self._logprob is None else self._logprob / max(1, self._tokens)
        return Outcome(self._call, text, reason, tokens=self._tokens, logprob=logprob)

    def _book(self, attempt: Attempt, error: EngineError) -> None:
        """Remember the failure of an engine that was asked."""
        self._health[attempt.engine].failed(error, attempt.started, self._clock())

    def _fail(self, attempt: Attempt, error: EngineError, *, will_retry: bool) -> None:
        self._flying.remove(attempt)
        if attempt.replica:
            self._failed_on.add(attempt.replica)
        seconds = self._clock() - attempt.started
        kind = type(error).__name__
        self._journal.emit(AgentFailed(*self._head(attempt), kind, error.message, will_retry, seconds, attempt.usage))

    def _cut_off(self, attempt: Attempt, reason: str) -> None:
        self._flying.remove(attempt)
        self._health[attempt.engine].released()
        seconds = self._clock() - attempt.started
        self._journal.emit(AgentCancelled(*self._head(attempt), reason, seconds, attempt.usage))

    def _head(self, attempt: Attempt) -> tuple[str, float, str, str, str, int, int]:
        """The fields that every event of an agent starts with."""
        call = self._call
        return (
            self._journal.run,
            self._journal.now,
            call.id,
            call.agent,
            attempt.engine,
            call.layer,
            attempt.number,
        )


def _back_off_s(retries: int, error: EngineError) -> float:
    """Exponential back-off with full jitter (Brooker 2015), or what the engine asked for."""
    if error.retry_after_s is not None:
        return error.retry_after_s
    return random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**retries))
