"""Asking every arm every question, and what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from moa_ray.engines.protocol import Usage
from moa_ray.errors import MoARayError
from moa_ray.evaluate.arms import Arm
from moa_ray.evaluate.cache import CachedEngine, Timing
from moa_ray.evaluate.scorers import scorer as scorer_of
from moa_ray.evaluate.served import Served
from moa_ray.evaluate.tasks import Item, Task
from moa_ray.gates import registry as gates
from moa_ray.graph import Message
from moa_ray.runtime import Runner, RunOptions, RunResult


@dataclass(frozen=True, slots=True)
class Said:
    """One call of a trial.

    Args:
        turn: In which turn of the conversation, from 1.
        agent: Who was asked.
        layer: In which layer, from 1.
        final: Whether it wrote the answer.
        text: What it said, "" where it failed.
        score: How right that is; None without a scorer.
        usage: Its tokens.
    """

    turn: int
    agent: str
    layer: int
    final: bool
    text: str
    score: float | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class Trial:
    """One question to one arm.

    Args:
        arm: Name of the arm.
        item: Id of the question.
        answers: The answer, and those to what the user said after it; empty where the arm failed.
        score: How right the last one is, from 0 to 1; 0 where the arm failed; None without a scorer.
        usage: Tokens of all calls, those that failed included.
        ttft_s: Seconds to the first token of the (first) answer along the critical path: each call takes as long as it
            took when it was made, and starts when all that it sees is there.
        total_s: The same to the last token, of all turns.
        said: All calls, of all turns.
        error: Why it failed, "" where it did not.
    """

    arm: str
    item: str
    answers: tuple[str, ...]
    score: float | None
    usage: Usage
    ttft_s: float | None
    total_s: float
    said: tuple[Said, ...] = field(repr=False, default=())
    error: str = ""

    @property
    def length(self) -> int:
        """Characters of all answers."""
        return sum(map(len, self.answers))


Ended = Callable[[Trial], None]
"""Told of each trial that ended."""


async def run(arm: Arm, task: Task, served: Served, *, concurrency: int, ended: Ended) -> list[Trial]:
    """Ask one arm all questions, so many at a time; an arm that fails on some fails on these alone.

    Raises:
        MoARayError: If the engines do not start.
    """
    places = asyncio.Semaphore(concurrency)
    engines = served.engines(arm.graph)
    gate = gates.for_runner(arm.graph)
    runner = Runner(arm.graph, engines, gate=gate)

    async def ask(item: Item) -> Trial:
        async with places:
            trial = await _ask(arm, item, task, runner, engines)
            if served.broken:
                raise served.broken
        ended(trial)
        return trial

    tasks = [asyncio.create_task(ask(item)) for item in task.items]
    try:
        return list(await asyncio.gather(*tasks))
    finally:  # of one that raised, or of an interrupt, the rest is not worth waiting for
        for each in tasks:
            each.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if gate:
            await gate[0].close()


async def _ask(arm: Arm, item: Item, task: Task, runner: Runner, engines: dict[str, CachedEngine]) -> Trial:
    score = scorer_of(task.scorer) if task.scorer else None
    messages: list[Message] = list(item.messages)
    answers: list[str] = []
    said: list[Said] = []
    usage, ttft_s, total_s = Usage(), None, 0.0
    for follow_up in ("", *item.follow_ups):
        if follow_up:
            messages.append({"role": "user", "content": follow_up})
        try:
            result = await runner.run(messages, RunOptions(agent=arm.agent, answer_flush_s=inf))
        except MoARayError as error:
            failed = 0.0 if task.scorer else None
            return Trial(arm.name, item.id, (), failed, usage, None, total_s, tuple(said), error.message)
        first_s, last_s = _critical_path(arm, result, engines)
        if not answers:
            ttft_s = first_s
        total_s += last_s
        usage += result.usage
        for record in result.agents:
            right = score(record.text, item.references) if score and record.state == "finished" else None
            final = record.call == result.source and record.layer > arm.graph.depth
            said.append(Said(len(answers) + 1, record.agent, record.layer, final, record.text, right, record.usage))
        answers.append(result.text)
        messages.append({"role": "assistant", "content": result.text})
    right = score(answers[-1], item.references) if score else None
    return Trial(arm.name, item.id, tuple(answers), right, usage, ttft_s, total_s, tuple(said))


def _critical_path(arm: Arm, result: RunResult, engines: dict[str, CachedEngine]) -> tuple[float | None, float]:
    """Seconds to the first and to the last token of the answer, from what each call took when it was made."""
    run = f"{result.trace[0].run}/"
    timings: dict[str, list[Timing]] = {}
    for engine in set(engines.values()):
        for name in [name for name in engine.timings if name.startswith(run)]:
            call = name.removeprefix(run).rpartition("/")[0]
            timings.setdefault(call, []).append(engine.timings.pop(name))
    took = {call: sum(each.total_s for each in found) for call, found in timings.items()}
    ends: dict[str, float] = {}
    for each in arm.graph.calls:
        if each.id in took:
            ends[each.id] = max((ends[seen] for seen in each.inputs if seen in ends), default=0.0) + took[each.id]
    proposed = max((ends[call] for call in arm.graph.finals if call in ends), default=0.0)
    last = proposed + sum(took[call] for call in took if call not in ends)  # the answer; a gate's question, too
    answered = result.source in took and result.source not in ends
    first = timings[result.source][0].ttft_s if answered else None
    return last if not answered else None if first is None else last - took[result.source] + first, last


def tokens_of(trials: Sequence[Trial]) -> float:
    """Tokens of a trial on average, prompt and completion."""
    spent = [trial.usage.prompt_tokens + trial.usage.completion_tokens for trial in trials]
    return sum(spent) / max(len(spent), 1)


def to_json(trial: Trial) -> dict[str, Any]:
    """A trial for a results file, without what its proposers said."""
    return {
        "arm": trial.arm,
        "item": trial.item,
        "answers": list(trial.answers),
        "score": trial.score,
        "prompt_tokens": trial.usage.prompt_tokens,
        "completion_tokens": trial.usage.completion_tokens,
        "ttft_s": trial.ttft_s,
        "total_s": trial.total_s,
        "error": trial.error,
    }
