"""Streaming modes over a real llama.cpp."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio

from moa_ray.engines import catalogue
from moa_ray.engines.llamacpp import LlamaCpp, LlamaCppOptions
from moa_ray.graph import from_dict
from moa_ray.runtime import AgentWarmed, Runner, RunOptions, RunResult

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def llama() -> AsyncGenerator[LlamaCpp, None]:
    path = catalogue.resolve("smollm2-135m-instruct")
    engine = await LlamaCpp.create(str(path), LlamaCppOptions(context_window=1024, slots=3), num_cpus=1)
    yield engine
    await engine.close()


def _graph(prompt: str) -> Any:
    return from_dict(
        {
            "version": 1,
            "name": "panel",
            "engines": {"smol": {"kind": "llamacpp", "model": "m"}},
            "agents": {
                "a": {"engine": "smol", "max_tokens": 40, "temperature": 0},
                "b": {"engine": "smol", "max_tokens": 40, "temperature": 0},
                "chief": {"engine": "smol", "max_tokens": 24, "temperature": 0},
            },
            "layers": [["a", "b"]],
            "aggregator": "chief",
            "prompt": prompt,
        }
    )


async def _run(llama: LlamaCpp, prompt: str, **policy: Any) -> RunResult:
    runner = Runner(_graph(prompt), {"smol": llama})
    return await runner.run(f"Why is the sky blue? Say it {prompt}.", RunOptions(policy=policy))


@pytest.mark.parametrize("prompt", ["stable", "woven"])
async def test_greedy_answers_of_overlap_are_those_of_barrier_and_begin_in_the_cache(
    llama: LlamaCpp, prompt: str
) -> None:
    overlap = await _run(llama, prompt, streaming="overlap")
    barrier = await _run(llama, prompt)
    assert [record.text for record in overlap.agents] == [record.text for record in barrier.agents]
    assert overlap.text == barrier.text
    assert any(isinstance(event, AgentWarmed) for event in overlap.trace)
    assert overlap.agents[-1].usage.cached_tokens > overlap.agents[-1].usage.prompt_tokens * 0.5
