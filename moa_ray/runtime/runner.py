"""One request through one graph.

Every call of the graph is a task that waits for its inputs, asks its engine, and ends in an `Outcome`.
A join waits for a set of calls as the policy says: for all of them, or for a quorum and a grace. The
retry loop in here is the only one in moa-ray.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from math import inf, isinf
from typing import Any
from uuid import uuid4

from moa_ray.engines.protocol import Chunk, Engine, EngineRequest, FinishReason, Sampling, Usage
from moa_ray.errors import DeadlineExceeded, EngineError, EngineTimeout, EngineUnavailable, MoARayError, QuorumNotMet
from moa_ray.graph import Call, Graph, Message, conversation
from moa_ray.graph.prompts import Prompt
from moa_ray.graph.spec import RankAggregator, VoteAggregator
from moa_ray.runtime import choose, context, limits
from moa_ray.runtime.events import (
    AgentCancelled,
    AgentDelta,
    AgentFailed,
    AgentFinished,
    AgentStarted,
    AnswerDelta,
    Event,
    LayerStarted,
    RunFinished,
    RunStarted,
)
from moa_ray.runtime.ledger import Ledger, RunResult

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_SEEDS = 2**31
"""What every engine takes as a seed lies below."""
_GATHER_S = 0.01
"""Events that nobody waits for are held back so long, to cross an actor boundary in fewer messages."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a reader wants a run.

    Args:
        draft_flush_s: The longest time that text of a proposal may be held back; inf sends no deltas.
        answer_flush_s: The same for the answer.
        agent: Ask this agent alone, in place of the whole graph.
        sampling: What the answer is to be sampled with; None leaves a value to the agent. A seed makes every call
            of the run reproducible.
        extra: Further fields for the answering engine, in OpenAI's words.
        k: Ask only the first `k` agents of each layer; a sequence says it layer by layer.
        policy: Keys of the graph's policy with other values; see `limits`.
    """

    draft_flush_s: float = inf
    answer_flush_s: float = 0.02
    agent: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    extra: Mapping[str, Any] = field(default_factory=dict)
    k: int | tuple[int, ...] | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: with a text, or with an error."""

    call: Call
    text: str = ""
    finish_reason: FinishReason | None = None
    error: MoARayError | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the aggregator made of the last proposals."""

    text: str
    source: str
    finish_reason: FinishReason | None
    note: str = ""


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


class Runner:
    """Runs requests through one graph over its engines; holds nothing between two requests.

    Args:
        graph: The graph.
        engines: An engine for every name in `graph.engines`.
    """

    def __init__(self, graph: Graph, engines: Mapping[str, Engine]) -> None:
        self.graph = graph
        self.engines = engines

    async def batches(
        self, prompt: str | Iterable[Message], options: RunOptions | None = None
    ) -> AsyncGenerator[list[Event], None]:
        """Run one request, with events that come close together in one list.

        Text of the answer is passed on at once, all else after at most `_GATHER_S`. The last event of the last
        list is always `run.finished`. Closing the iterator cancels every engine call of the run.

        Raises:
            RequestError: If the prompt is empty or malformed.
            MoARayError: After `run.finished`, if the run failed.
        """
        run = _Run(self, conversation(prompt), options or RunOptions())
        task = asyncio.create_task(run.execute())
        task.add_done_callback(lambda _: run.end())
        try:
            while batch := await run.batch():
                yield batch
            await task
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def stream(
        self, prompt: str | Iterable[Message], options: RunOptions | None = None
    ) -> AsyncGenerator[Event, None]:
        """`batches`, one event at a time."""
        async with aclosing(self.batches(prompt, options)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def run(self, prompt: str | Iterable[Message], options: RunOptions | None = None) -> RunResult:
        """Run one request to its end. Raises as `stream` does."""
        async with aclosing(self.stream(prompt, options)) as events:
            return RunResult.of([event async for event in events])


class _Run:
    """The state of one request."""

    def __init__(self, runner: Runner, messages: list[Message], options: RunOptions) -> None:
        self.graph = limits.graph_for(runner.graph, options.k)
        self.policy = limits.policy_for(self.graph, options.policy)
        self.answer_call = limits.answer_for(self.graph, options.agent)
        self.planned = () if options.agent else self.graph.calls
        self.engines = runner.engines
        self.messages = tuple(messages)
        self.options = options
        self.id = f"run-{uuid4().hex[:12]}"
        self.events: list[Event] = []
        self.something, self.urgent, self.ended = asyncio.Event(), asyncio.Event(), False
        self.ledger = Ledger()
        self.clock = asyncio.get_running_loop().time
        self.started = self.clock()
        self.deadline = self.started + self.policy.deadline_s
        self.answer: list[str] = []
        self.answer_ttft_s: float | None = None
        self.layers_begun: set[int] = set()
        self.calls: dict[str, asyncio.Task[Outcome]] = {}
        self.joins: dict[tuple[str, ...], asyncio.Task[list[Outcome]]] = {}

    def emit(self, event: Event) -> None:
        self.ledger.add(event)
        self.events.append(event)
        self.something.set()
        if isinstance(event, AnswerDelta):
            self.urgent.set()

    async def batch(self) -> list[Event]:
        """The next events; none at the end."""
        await self.something.wait()
        if not self.urgent.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_GATHER_S):
                    await self.urgent.wait()
        events, self.events = self.events, []
        if not self.ended:
            self.something.clear()
            self.urgent.clear()
        return events

    def end(self) -> None:
        """There will be no more events."""
        self.ended = True
        self.something.set()
        self.urgent.set()

    @property
    def now(self) -> float:
        """Seconds since the run started."""
        return self.clock() - self.started

    # ------------------------------------------------------------------ the whole run

    async def execute(self) -> None:
        """Walk the graph; emit `run.finished`, and raise what made the run fail."""
        planned = len(self.planned) + (self.answer_call is not None)
        self.emit(RunStarted(self.id, 0.0, self.graph.spec.name, planned))
        result: _Answer | MoARayError
        try:
            async with asyncio.timeout_at(self.deadline):
                result = await self._walk()
        except TimeoutError:
            result = DeadlineExceeded(
                f"the request did not finish within its deadline of {self.policy.deadline_s:g} s",
                hint="raise policy.deadline_s, or lower max_tokens",
            )
        usage = self.ledger.usage
        if isinstance(result, MoARayError):
            kind, text = type(result).__name__, "".join(self.answer)
            self.emit(
                RunFinished(self.id, self.now, text, usage, self.answer_ttft_s, error=kind, message=result.message)
            )
            raise result
        self.emit(
            RunFinished(
                self.id,
                self.now,
                result.text,
                usage,
                self.answer_ttft_s,
                source=result.source,
                finish_reason=result.finish_reason,
                note=result.note,
            )
        )

    async def _walk(self) -> _Answer | MoARayError:
        async with asyncio.TaskGroup() as group:
            for call in self.planned:  # topological order: the inputs of a call are tasks already
                self._join_task(group, call.inputs)
                self.calls[call.id] = group.create_task(self._call(call))
            finals = self.graph.finals if self.planned else ()
            proposals = await self._joined(self._join_task(group, finals))
            if isinstance(proposals, MoARayError):
                result: _Answer | MoARayError = proposals
            else:
                result = await self._aggregate(proposals)
            for task in (*self.calls.values(), *self.joins.values()):  # stragglers that nobody waits for
                task.cancel()
        return result

    async def _aggregate(self, proposals: list[Outcome]) -> _Answer | MoARayError:
        texts = [outcome.text for outcome in proposals]
        aggregator, call = self.graph.spec.aggregator, self.answer_call
        if isinstance(aggregator, VoteAggregator) and self.planned:
            return self._take(proposals, *choose.vote(texts, aggregator.vote))
        assert call is not None
        outcome = await self._ask(call, proposals)
        if outcome.error is not None:
            return outcome.error
        if self._ranks(call):
            return self._take(proposals, *choose.picked(outcome.text, len(texts)))
        return _Answer(outcome.text, call.id, outcome.finish_reason)

    def _take(self, proposals: list[Outcome], index: int, note: str) -> _Answer:
        chosen = proposals[index]
        self._answer_delta(chosen.text)
        return _Answer(chosen.text, chosen.call.id, chosen.finish_reason, note)

    def _ranks(self, call: Call) -> bool:
        """Whether `call` names the best proposal, in place of answering."""
        return call is self.graph.answer and isinstance(self.graph.spec.aggregator, RankAggregator)

    def _answer_delta(self, text: str, tool_calls: tuple[dict[str, Any], ...] = ()) -> None:
        if self.answer_ttft_s is None:
            self.answer_ttft_s = self.now
        self.answer.append(text)
        self.emit(AnswerDelta(self.id, self.now, text, tool_calls))

    # ------------------------------------------------------------------ joins

    def _join_task(self, group: asyncio.TaskGroup, inputs: tuple[str, ...]) -> asyncio.Task[list[Outcome]]:
        if inputs not in self.joins:
            self.joins[inputs] = group.create_task(self._join(inputs))
        return self.joins[inputs]

    async def _join(self, inputs: tuple[str, ...]) -> list[Outcome]:
        """Outcomes of `inputs` in their order, those that were cut off left out."""
        tasks = {self.calls[name]: name for name in inputs}
        pending = set(tasks)
        quorum = min(self.policy.quorum, len(inputs))
        give_up = inf
        while pending and (left := give_up - self.clock()) > 0:
            timeout = None if isinf(left) else left
            done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            answered = sum(task.result().error is None for task in tasks if task.done())
            if done and answered >= quorum and self.policy.grace_s is not None:
                give_up = min(give_up, self.clock() + self.policy.grace_s)
        for task in pending:
            self._release(task, tasks[task], inputs)
        return [task.result() for task in tasks if task not in pending]

    def _release(self, task: asyncio.Task[Outcome], name: str, inputs: tuple[str, ...]) -> None:
        """Cut off a straggler, unless somebody else still waits for it."""
        if all(join.done() for other, join in self.joins.items() if name in other and other != inputs):
            task.cancel()

    async def _joined(self, join: asyncio.Task[list[Outcome]]) -> list[Outcome] | MoARayError:
        """The answers that `join` gathered, or the error that says why there are too few."""
        await asyncio.wait({join})  # unlike awaiting the task, this does not cancel it with us
        outcomes = join.result()
        answers = [outcome for outcome in outcomes if outcome.error is None]
        errors = {outcome.call: outcome.error for outcome in outcomes if outcome.error is not None}
        inputs = next(names for names, task in self.joins.items() if task is join)
        needed = min(self.policy.quorum, len(inputs))
        if len(answers) >= needed:
            return answers
        for error in errors.values():  # the layers above a failed one fail with its error
            if isinstance(error, QuorumNotMet):
                return error
        reasons = "; ".join(f"{call.id} ({type(error).__name__}: {error.message})" for call, error in errors.items())
        return QuorumNotMet(f"{len(answers)} of {len(inputs)} agents answered, {needed} needed: {reasons}")

    # ------------------------------------------------------------------ calls

    async def _call(self, call: Call) -> Outcome:
        inputs = await self._joined(self.joins[call.inputs])
        if isinstance(inputs, MoARayError):
            return Outcome(call, error=inputs)
        return await self._ask(call, inputs)

    async def _ask(self, call: Call, inputs: list[Outcome]) -> Outcome:
        """One call with its retries, inside its share of the time that is left."""
        self._begin_layer(call.layer)
        agent = self.graph.spec.agents[call.agent]
        stages_left = self.graph.depth + 2 - call.layer
        share_s = (self.deadline - self.clock()) / stages_left
        limit_s = min(agent.timeout_s or inf, share_s)
        current = _Attempt(1, self.clock())
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    try:
                        return await self._attempt(call, inputs, current)
                    except EngineError as error:
                        again = self._may_retry(call, current, error)
                        self._fail(call, current, error, will_retry=again)
                        if not again:
                            return Outcome(call, error=error)
                        await asyncio.sleep(_pause_s(current.number, error))
                        current = _Attempt(current.number + 1, self.clock())
        except TimeoutError:
            late = EngineTimeout(f"no complete answer within {limit_s:.3g} s", engine=self.graph.engine_of(call.agent))
            self._fail(call, current, late, will_retry=False)
            return Outcome(call, error=late)
        except asyncio.CancelledError:
            late_run = self.clock() >= self.deadline
            reason = "the request's deadline passed" if late_run else "not needed any more"
            seconds = self.clock() - current.started
            self.emit(AgentCancelled(*self._head(call, current), reason, seconds, current.usage))
            raise

    async def _attempt(self, call: Call, inputs: list[Outcome], current: _Attempt) -> Outcome:
        engine = self.engines[self.graph.engine_of(call.agent)]
        is_answer = call is self.answer_call and not self._ranks(call)
        flush_s = self.options.answer_flush_s if is_answer else self.options.draft_flush_s
        sampling = self._sampling(call)
        info = await engine.info()
        messages, trimmed = await context.fit(self._prompt(call, inputs), engine, info, sampling.max_tokens)
        self.emit(AgentStarted(*self._head(call, current), len(inputs), trimmed))
        extra = self.options.extra if is_answer else {}
        request = EngineRequest(f"{self.id}/{call.id}", messages, sampling, flush_s, call.agent, extra)
        async with aclosing(engine.stream(request)) as chunks:
            async for chunk in chunks:
                if chunk.text or chunk.tool_calls:
                    self._receive(call, current, chunk, is_answer, silent=isinf(flush_s))
                if chunk.finish_reason is not None:
                    return self._finish(call, current, chunk.usage, chunk.ttft_s, chunk.finish_reason)
        raise EngineUnavailable("the stream ended without saying why")

    def _receive(self, call: Call, current: _Attempt, chunk: Chunk, is_answer: bool, *, silent: bool) -> None:
        if current.ttft_s is None:
            current.ttft_s = self.clock() - current.started
        current.text.append(chunk.text)
        current.tokens += chunk.tokens
        if is_answer:
            self._answer_delta(chunk.text, chunk.tool_calls)
        elif not silent:
            self.emit(AgentDelta(*self._head(call, current), chunk.text, chunk.tokens))

    def _finish(
        self, call: Call, current: _Attempt, usage: Usage | None, ttft_s: float | None, reason: FinishReason
    ) -> Outcome:
        text = "".join(current.text)
        if not text.strip() and reason != "tool_calls":
            raise EngineUnavailable("the answer is empty")
        seconds = self.clock() - current.started
        # Where text was held back, only the engine knows when its first token came.
        first_s = ttft_s if ttft_s is not None else current.ttft_s
        self.emit(
            AgentFinished(*self._head(call, current), text, usage or current.usage, seconds, first_s or seconds, reason)
        )
        return Outcome(call, text, reason)

    def _fail(self, call: Call, current: _Attempt, error: EngineError, *, will_retry: bool) -> None:
        seconds = self.clock() - current.started
        kind = type(error).__name__
        self.emit(AgentFailed(*self._head(call, current), kind, error.message, will_retry, seconds, current.usage))

    def _may_retry(self, call: Call, current: _Attempt, error: EngineError) -> bool:
        answer_begun = call is self.answer_call and bool(self.answer)
        return error.retryable and current.number <= self.policy.retries and not answer_begun

    def _head(self, call: Call, current: _Attempt) -> tuple[str, float, str, str, str, int, int]:
        """The fields that every event of an agent starts with."""
        return (
            self.id,
            self.now,
            call.id,
            call.agent,
            self.graph.engine_of(call.agent),
            call.layer,
            current.number,
        )

    def _begin_layer(self, layer: int) -> None:
        if layer not in self.layers_begun:
            self.layers_begun.add(layer)
            self.emit(LayerStarted(self.id, self.now, layer, self.graph.agents_of_layer(layer)))

    def _prompt(self, call: Call, inputs: list[Outcome]) -> Prompt:
        spec = self.graph.spec
        return Prompt(
            spec.agents[call.agent].system,
            self.messages,
            tuple(outcome.text for outcome in inputs),
            spec.prompt,
            "pick" if self._ranks(call) else "synthesize",
        )

    def _sampling(self, call: Call) -> Sampling:
        agent, wanted = self.graph.spec.agents[call.agent], self.options.sampling
        seed = agent.seed + call.sample - 1 if agent.seed is not None else None
        if wanted.seed is not None:
            seed = (wanted.seed + (self.planned.index(call) + 1 if call in self.planned else 0)) % _SEEDS
        sampling = Sampling(agent.temperature, agent.top_p, agent.max_tokens, seed, tuple(agent.stop))
        if call is self.answer_call and not self._ranks(call):
            return replace(
                sampling,
                temperature=sampling.temperature if wanted.temperature is None else wanted.temperature,
                top_p=sampling.top_p if wanted.top_p is None else wanted.top_p,
                max_tokens=wanted.max_tokens or sampling.max_tokens,
                stop=wanted.stop or sampling.stop,
            )
        if agent.max_tokens is None and call is not self.answer_call:  # cap proposals, never the aggregator
            sampling = replace(sampling, max_tokens=self.graph.spec.proposal_max_tokens)
        return sampling


def _pause_s(attempt: int, error: EngineError) -> float:
    """Exponential back-off with full jitter (Brooker 2015), or what the engine asked for."""
    if error.retry_after_s is not None:
        return error.retry_after_s
    return random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1)))
