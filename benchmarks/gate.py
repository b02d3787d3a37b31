"""Whether learned gates choose well, what that saves, and what they take.

Agents are scripted, each with a known chance of being right on a topic, so that the right choice is known; the
questions are real ones of MT-Bench and GSM8K and some made from templates, embedded by all-MiniLM-L6-v2. Peers: the
whole panel, and its best agent alone. Run: `python -m benchmarks.gate DATA`, DATA a folder with
`mt_bench_question.jsonl` and `gsm8k_test.jsonl`; `quality`, `alone` or `overhead` after it runs one part.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve

from benchmarks.topics import TOPICS, questions
from moa_ray import MoA
from moa_ray.cluster.gate_actor import HandleGate
from moa_ray.engines import Chunk, EngineInfo, EngineRequest, Usage
from moa_ray.gates import Choice, Question, registry
from moa_ray.gates.learned.embeddings import Embedder, EmbeddingOptions, model_of
from moa_ray.gates.learned.train import train
from moa_ray.graph import Graph, from_dict
from moa_ray.runtime import GateDecided, Runner, RunOptions, RunResult

_AGENTS = tuple(f"knows_{topic}" for topic in TOPICS)
_TRAIN, _HELD_OUT, _K = 2000, 500, 2
_ANSWER_TOKENS = 60

Skill = Callable[[int, int], float]
"""Chance that agent number `a` is right on topic number `t`."""


def specialists(agent: int, topic: int) -> float:
    """Each knows one topic."""
    return 0.9 if agent == topic else 0.2


def equals(agent: int, topic: int) -> float:
    """Nobody is better than others at anything."""
    return 0.5


def one_is_best(agent: int, topic: int) -> float:
    """The first knows everything better, and a vote among all is no better than it."""
    return 0.9 if agent == 0 else 0.1


def truth(question: str) -> int:
    """The right answer, a number."""
    return zlib.crc32(question.encode()) % 1000


@dataclass
class Skilled:
    """An `Engine` of agents with known skills: the same question gets the same answer of an agent each time."""

    skill: Skill
    topics: Mapping[str, int]

    async def info(self) -> EngineInfo:
        """Nothing but its name."""
        return EngineInfo("skilled")

    def reward(self, agent: int, question: str) -> float:
        """1 where the agent is right, else 0."""
        draw = random.Random(f"{agent} {question}").random()
        return float(draw < self.skill(agent, self.topics[question]))

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """An answer of so many tokens that ends in a number, from an agent that is always sure of itself."""
        question = request.messages[-1]["content"]
        agent = _AGENTS.index(request.agent)
        wrong = truth(question) + 1 + random.Random(f"wrong {agent} {question}").randrange(50)
        answer = truth(question) if self.reward(agent, question) else wrong
        text = "so " * (_ANSWER_TOKENS - 1) + str(answer)
        usage = Usage(sum(len(message["content"].split()) for message in request.messages), _ANSWER_TOKENS)
        yield Chunk(text, _ANSWER_TOKENS, "stop", usage, logprob=-0.01 * _ANSWER_TOKENS)

    async def warm(self, request: EngineRequest) -> Usage:
        """Nothing to read ahead."""
        return Usage()

    async def count_tokens(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """A word is a token."""
        return sum(len(message["content"].split()) for message in messages)

    async def close(self) -> None:
        """Nothing to give back."""


def panel(gate: Mapping[str, Any]) -> Graph:
    """The agents in one layer, and a vote among them."""
    return from_dict(
        {
            "version": 1,
            "name": "gated",
            "engines": {"skilled": {"kind": "scripted", "model": "skilled"}},
            "agents": {name: {"engine": "skilled"} for name in _AGENTS},
            "layers": [list(_AGENTS)],
            "aggregator": {"vote": {"extract": "number"}},
            "gate": dict(gate),
        }
    )


@dataclass(frozen=True)
class Score:
    """What a way to answer came to: share of right answers, mean tokens, and who was asked how often."""

    right: float
    tokens: float
    has_best: float
    max_over_mean: float


async def score(graph: Graph, engine: Skilled, asked: Sequence[tuple[str, int]], agent: str | None = None) -> Score:
    """Ask all questions, one after the other."""
    gate = None if graph.spec.gate.kind == "all" else (registry.create(graph), 60.0)
    runner = Runner(graph, {"skilled": engine}, gate=gate)
    results = [await runner.run(text, RunOptions(agent=agent)) for text, _ in asked]
    if gate is not None:
        await gate[0].close()
    loads = [sum(any(r.agent == name for r in result.agents) for result in results) for name in _AGENTS]
    return Score(
        statistics.mean(
            result.text.endswith(f" {truth(text)}") for result, (text, _) in zip(results, asked, strict=True)
        ),
        statistics.mean(result.usage.prompt_tokens + result.usage.completion_tokens for result in results),
        statistics.mean(
            any(record.agent == _AGENTS[topic] for record in result.agents)
            for result, (_, topic) in zip(results, asked, strict=True)
        ),
        max(loads) / statistics.mean(loads),
    )


def record(path: Path, engine: Skilled, asked: Sequence[tuple[str, int]], panels: Sequence[RunResult] = ()) -> Path:
    """Outcomes of `asked`, of which half of the agents' answers were judged, and the panel's where it was asked."""
    dice = random.Random(1)
    with path.open("w") as file:
        for number, (text, _) in enumerate(asked):
            judged = dice.sample(range(len(_AGENTS)), len(_AGENTS) // 2)
            tokens = len(text.split()) + _ANSWER_TOKENS
            line: dict[str, Any] = {
                "prompt": text,
                "rewards": {_AGENTS[agent]: engine.reward(agent, text) for agent in judged},
                "tokens": {_AGENTS[agent]: tokens for agent in judged},
            }
            if panels:
                line |= {"panel": float(panels[number].text.endswith(f" {truth(text)}"))}
            file.write(json.dumps(line) + "\n")
    return path


async def quality(data: Path, folder: Path) -> None:
    """The right agents, at what cost, and evenly where they are equal."""
    seen, new = questions(data, _TRAIN, 0, held_out=False), questions(data, _HELD_OUT, 1, held_out=True)
    engine = Skilled(specialists, dict([*seen, *new]))
    whole = await score(panel({}), engine, new)
    print(f"{_TRAIN} recorded outcomes, half judged; {_HELD_OUT} held-out questions; {len(_AGENTS)} agents, k = {_K}")
    print(f"  the whole panel: {whole.right:.1%} right, {whole.tokens:.0f} tokens")
    for kind in ("noisy_top_k", "knn"):
        bound = panel({"kind": kind, "k": _K, "file": str(folder / kind)})
        (await train(bound, record(folder / "outcomes", engine, seen))).gate.write(folder / kind)
        gated = await score(bound, engine, new)
        print(
            f"  {kind}: best agent chosen {gated.has_best:.1%} (95 % wanted), {gated.right:.1%} right, "
            f"{gated.tokens / whole.tokens:.0%} of the panel's tokens (35 % allowed)"
        )
    engine = Skilled(equals, engine.topics)
    bound = panel({"kind": "noisy_top_k", "k": _K, "file": str(folder / "equal")})
    (await train(bound, record(folder / "outcomes", engine, seen))).gate.write(folder / "equal")
    gated = await score(bound, engine, new)
    print(f"  equal skills: max/mean load {gated.max_over_mean:.2f} on held-out questions (1.2 allowed)")


async def alone(data: Path, folder: Path) -> None:
    """A panel that is no better than its best agent is not asked."""
    seen, new = questions(data, _TRAIN, 0, held_out=False), questions(data, _HELD_OUT, 1, held_out=True)
    engine = Skilled(one_is_best, dict([*seen, *new]))
    runner = Runner(panel({}), {"skilled": engine})
    panels = [await runner.run(text) for text, _ in seen]
    whole, single = await score(panel({}), engine, new), await score(panel({}), engine, new, _AGENTS[0])
    print(f"a pool in which one agent is best: panel {whole.right:.1%} right with {whole.tokens:.0f} tokens, ")
    print(f"  that agent alone {single.right:.1%} with {single.tokens:.0f}")
    bound = panel({"kind": "solo", "file": str(folder / "solo"), "cost_weight": 0.1})
    (await train(bound, record(folder / "outcomes", engine, seen, panels))).gate.write(folder / "solo")
    cascade = panel({"kind": "cascade", "agent": _AGENTS[0], "confidence": "logprob"})
    for name, graph in (("solo", bound), ("cascade", cascade)):
        gated = await score(graph, engine, new)
        print(f"  {name}: {gated.right:.1%} right, {gated.tokens / single.tokens:.2f} x its tokens (1.00 wanted)")


# ---------------------------------------------------------------- what it takes


async def overhead(data: Path, folder: Path) -> None:
    """Time that requests wait for the gate in an actor of its own, and how much of that is the embedding."""
    asked = [text for text, _ in questions(data, 400, 2, held_out=True)]
    seen = questions(data, 400, 0, held_out=False)
    file = folder / "gate"
    bound = panel({"kind": "noisy_top_k", "k": _K, "file": str(file), "timeout_s": 10.0})
    engine = Skilled(specialists, dict(seen))
    (await train(bound, record(folder / "outcomes", engine, seen))).gate.write(file)
    options = EmbeddingOptions()
    embedder = Embedder(model_of(options), options.batch)
    embedding = await _p50_ms([lambda text=text: embedder.one(text) for text in asked[:200]])
    hop = await asyncio.to_thread(_served, bound, asked)
    print(f"  alone in a process, the embedding takes {embedding:.1f} ms, 50 of them {50 * embedding / 1e3:.2f} s")
    print(f"  the way to the gate and back takes {hop:.1f} ms (3 allowed)")


class Instant:
    """A gate's deployment that knows the answer."""

    async def choose(self, messages: object, agents: tuple[str, ...]) -> Choice:
        """The first two."""
        return Choice(dict.fromkeys(agents[:_K], 1.0))


def _served(graph: Graph, asked: Sequence[str]) -> float:
    with MoA(graph) as moa:
        moa.run("why?")
        p50 = statistics.median(_gate_s(moa.run(text)) for text in asked[200:]) * 1e3
        print(f"one caller waits {p50:.1f} ms p50 for its gate (15 allowed)")
        started = time.perf_counter()
        with ThreadPoolExecutor(50) as callers:
            waits = sorted(map(_gate_s, callers.map(moa.run, asked[:50])))
        took = time.perf_counter() - started
        print(f"50 at once: {waits[25] * 1e3:.0f} ms p50, {waits[-1] * 1e3:.0f} ms at most, all in {took:.2f} s")
        deployment = serve.deployment(Instant, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100)
        handle = serve.run(deployment.bind(), name="instant", route_prefix=None)
        question = Question(({"role": "user", "content": asked[0]},), _AGENTS)
        gate = HandleGate(handle)
        return asyncio.run(_p50_ms([lambda: gate.choose(question)] * 200))


async def _p50_ms(asking: Sequence[Callable[[], Any]]) -> float:
    times = []
    for ask in asking:
        started = time.perf_counter()
        await ask()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def _gate_s(result: RunResult) -> float:
    (event,) = (event for event in result.trace if isinstance(event, GateDecided))
    if event.failed:
        raise RuntimeError(event.failed)
    return event.seconds


_PARTS = {"quality": quality, "alone": alone, "overhead": overhead}


def main(arguments: Sequence[str]) -> None:
    """All parts, or those that are named."""
    data, *wanted = arguments
    for name in wanted or _PARTS:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(_PARTS[name](Path(data), Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
