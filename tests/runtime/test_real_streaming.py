"""Streaming modes over a real llama.cpp."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from moa_ray.engines import Engine, Scripted, ScriptedOptions, catalogue
from moa_ray.engines.llamacpp import LlamaCpp, LlamaCppOptions
from moa_ray.graph import from_dict
from moa_ray.runtime import AgentWarmed, AnswerDelta, Runner, RunResult


@asynccontextmanager
async def _fresh() -> AsyncGenerator[dict[str, Engine], None]:
    """A real aggregator that has seen nothing yet, and proposers whose texts are known.

    What else llama.cpp has in a batch may change a greedy text; here nothing else is.
    """
    path = catalogue.resolve("smollm2-135m-instruct")
    chief = await LlamaCpp.create(str(path), LlamaCppOptions(context_window=1024, slots=1), num_cpus=1)
    said = {"a": "Blue light is scattered more than red light. " * 6, "b": "The air is made of small molecules. " * 40}
    panel = Scripted(ScriptedOptions(replies=said, itl_s=0.05))
    try:
        yield {"panel": panel, "chief": chief}
    finally:
        await chief.close()


async def _run(engines: dict[str, Engine], prompt: str, *, last: int = 40, **policy: Any) -> RunResult:
    greedy = {"temperature": 0, "max_tokens": 40}
    graph = from_dict(
        {
            "version": 1,
            "name": "panel",
            "engines": {name: {"kind": "llamacpp", "model": "m"} for name in engines},
            "agents": {
                "a": {"engine": "panel", "system": "You are a poet.", **greedy},
                "b": {"engine": "panel", "system": "You are a physicist.", **greedy, "max_tokens": last},
                "chief": {"engine": "chief", "temperature": 0, "max_tokens": 24},
            },
            "layers": [["a", "b"]],
            "aggregator": "chief",
            "prompt": prompt,
            "policy": policy,
        }
    )
    return await Runner(graph, engines).run("Why is the sky blue?")


@pytest.mark.parametrize("prompt", ["stable", "woven"])
async def test_overlap_asks_what_barrier_asks_and_the_answer_begins_in_the_cache(prompt: str) -> None:
    async with _fresh() as engines:
        overlap = await _run(engines, prompt, streaming="overlap")
    async with _fresh() as engines:
        barrier = await _run(engines, prompt)
    # Not the answer's text: how many tokens of a prompt llama.cpp reads at a time changes its last digits.
    for one, other in zip(overlap.agents, barrier.agents, strict=True):
        assert one.call == "answer" or one.text == other.text
        assert one.usage.prompt_tokens == other.usage.prompt_tokens
    assert overlap.text and barrier.text
    assert any(isinstance(event, AgentWarmed) for event in overlap.trace)
    cached = [result.agents[-1].usage.cached_tokens for result in (overlap, barrier)]
    assert cached[0] > overlap.agents[-1].usage.prompt_tokens * 0.25 and cached[1] == 0


async def test_a_staircase_begins_before_the_proposals_end_and_ends_properly() -> None:
    async with _fresh() as engines:
        result = await _run(engines, "stable", last=300, streaming="staircase", chunk_tokens=8)
    names = [event.name for event in result.trace if getattr(event, "call", "1/b") == "1/b"]
    assert names.index("answer.delta") < names.index("agent.finished")
    answer = result.agents[-1]
    assert answer.stages > 1 and answer.state == "finished"
    assert answer.usage.completion_tokens == 24 and result.text.strip()
    assert answer.text == "".join(event.text for event in result.trace if isinstance(event, AnswerDelta))
