"""The time to the first token in each streaming mode, side by side, against `barrier` in the same run.

Run: `python -m benchmarks.ttft` (scripted engines), `python -m benchmarks.ttft llamacpp`, or another engine kind and
model: `python -m benchmarks.ttft vllm smollm2-135m-instruct`. In this process, over real time.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from os.path import commonprefix
from typing import Any

from moa_ray.engines import Chunk, Engine, EngineRequest, registry
from moa_ray.graph import EngineSpec, Graph, Message, from_dict
from moa_ray.runtime import AgentFinished, CallRecord, Runner, RunResult

_MODES: Mapping[str, dict[str, Any]] = {
    "barrier": {},
    "overlap": {"streaming": "overlap"},
    "staircase/64": {"streaming": "staircase"},
    "staircase/16": {"streaming": "staircase", "chunk_tokens": 16},
}
_SCRIPT = {"ttft_s": 0.2, "itl_s": 0.01, "reply_tokens": 300, "prefill_s_per_token": 0.0005}
_REAL: Mapping[str, Mapping[str, Any]] = {
    "llamacpp": {"context_window": 2048, "slots": 4, "resources": {"num_cpus": 1}},
    "vllm": {
        "device": "cpu",
        "context_window": 2048,
        "engine_kwargs": {"block_size": 32},  # a prefix is cached in whole blocks, of 128 tokens by default
        "resources": {"num_cpus": 1},
    },
}
_QUESTIONS = (
    "Why is the sky blue? Explain it at length.",
    "And why is it red in the evening?",
    "What colour has the sky of Mars?",
    "How would a painter mix these colours?",
    "Sum up what we said in three sentences.",
)


def graph(layers: int, prompt: str, policy: Mapping[str, Any], engine: Mapping[str, Any], tokens: int) -> Graph:
    """`layers` layers of three proposers on one engine, and an aggregator on another."""
    agents = {name: {"engine": "panel", "max_tokens": tokens, "temperature": 0, "seed": 1} for name in ("a", "b", "c")}
    personas = {"a": "You are a teacher.", "b": "You are a physicist.", "c": "You are a poet."}
    return from_dict(
        {
            "version": 1,
            "name": "bench",
            "engines": {name: dict(engine) for name in ("panel", "chief")},
            "agents": {
                **{name: {**agent, "system": personas[name]} for name, agent in agents.items()},
                "chief": {"engine": "chief", "max_tokens": tokens, "temperature": 0},
            },
            "layers": [["a", "b", "c"]] * layers,
            "aggregator": "chief",
            "prompt": prompt,
            "policy": dict(policy),
        }
    )


async def made(spec: EngineSpec, names: Sequence[str]) -> dict[str, Engine]:
    """Engines that have seen nothing yet."""
    return {name: await registry.create(spec) for name in names}


async def closed(engines: Mapping[str, Engine]) -> None:
    for engine in engines.values():
        await engine.close()


# ---------------------------------------------------------------- what is printed


def row(result: RunResult, base: RunResult) -> str:
    """A run against that in barrier mode."""
    answer, before = result.agents[-1], base.agents[-1]
    assert result.ttft_s is not None and base.ttft_s is not None
    wait_s, before_s = waited_s(result), waited_s(base)
    return (
        f"first token {result.ttft_s:6.2f} s ({_less(result.ttft_s, base.ttft_s)})   "
        f"total {result.total_s:6.2f} s ({result.total_s / base.total_s:.2f} x)   "
        f"from the last proposal {wait_s:6.2f} s ({_less(wait_s, before_s)})   "
        f"read then {_read(answer):4d} tokens ({_less(_read(answer), _read(before))})   "
        f"warmed {answer.warmed.prompt_tokens - answer.warmed.cached_tokens}, {answer.stages} stages"
    )


def waited_s(result: RunResult) -> float:
    """From the end of the last proposal to the answer's first token; 0 where that was there before."""
    assert result.ttft_s is not None
    last = max(e.t for e in result.trace if isinstance(e, AgentFinished) and e.call != "answer")
    return max(0.0, result.ttft_s - last)


def _read(record: CallRecord) -> int:
    return record.usage.prompt_tokens - record.usage.cached_tokens


def _less(value: float, base: float) -> str:
    return f"{(1 - value / base) * 100 if base else 0:4.0f} % less"


# ---------------------------------------------------------------- what is measured


async def scripted() -> None:
    print(
        "scripted, 3 layers of 3 and an aggregator: 0.2 s + 10 ms a token, 300 tokens, prompts read at 0.5 ms a token"
    )
    spec = EngineSpec(kind="scripted", model="script", **_SCRIPT)
    for prompt in ("stable", "woven"):
        base = None
        for mode, policy in _MODES.items():
            engines = await made(spec, ("panel", "chief"))
            result = await Runner(graph(3, prompt, policy, spec.model_dump(), 300), engines).run(_QUESTIONS[0])
            base = base or result
            hidden = ""
            if mode == "overlap":  # of what comes on top of the script's fixed time to first token
                fixed_s = float(_SCRIPT["ttft_s"])
                hidden = f", {1 - (waited_s(result) - fixed_s) / (waited_s(base) - fixed_s):.0%} of the prefill hidden"
            print(f"  {prompt:<7}{mode:<14}{row(result, base)}{hidden}", flush=True)


async def real(kind: str, model: str, modes: Sequence[str], tokens: int) -> None:
    """One layer of three and an aggregator; engines are made anew for each mode, so that no cache helps."""
    spec = EngineSpec(kind=kind, model=model, **_REAL[kind])
    print(f"{kind} {model}: 3 proposals of {tokens} tokens and an aggregator")
    for prompt in ("stable", "woven"):
        base = None
        for mode in modes:
            engines = await made(spec, ("panel", "chief"))
            result = await Runner(graph(1, prompt, _MODES[mode], spec.model_dump(), tokens), engines).run(_QUESTIONS[0])
            await closed(engines)
            base = base or result
            same = "" if result.text != base.text else ", the same text"
            print(f"  {prompt:<7}{mode:<14}{row(result, base)}{same}", flush=True)


async def turns(kind: str, model: str, options: Mapping[str, Any]) -> None:
    """A conversation of five turns: how much of the aggregator's prompts comes out of the cache."""
    spec = EngineSpec(kind=kind, model=model, **options)
    print(f"{kind} {model}: five turns, 3 proposals of 60 tokens a turn; the aggregator's prompt tokens")
    for prompt in ("stable", "woven"):
        for mode in ("barrier", "overlap"):
            engines = await made(spec, ("panel", "chief"))
            chief = _Heard(engines["chief"], dict(options.get("engine_kwargs", {})).get("block_size", 1))
            runner = Runner(graph(1, prompt, _MODES[mode], spec.model_dump(), 60), {**engines, "chief": chief})
            history: list[Message] = []
            prompts = cached = cacheable = 0
            for question in _QUESTIONS:
                history.append({"role": "user", "content": question})
                result = await runner.run(history)
                usage = result.agents[-1].usage
                prompts, cached = prompts + usage.prompt_tokens, cached + usage.cached_tokens
                cacheable += await chief.cacheable()
                history.append({"role": "assistant", "content": result.text})
            await closed(engines)
            of_what_can = f", {cached / cacheable:.0%} of the turns before" if mode == "barrier" else ""
            print(
                f"  {prompt:<7}{mode:<14}{cached} of {prompts} cached ({cached / prompts:.0%}{of_what_can})", flush=True
            )


class _Heard:
    """An engine that caches prompts in blocks of so many tokens, and the prompts that it got."""

    def __init__(self, engine: Engine, block: int) -> None:
        self._engine = engine
        self._block = block
        self._prompts: list[tuple[Message, ...]] = [()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        self._prompts.append(request.messages)
        async for chunk in self._engine.stream(request):
            yield chunk

    async def cacheable(self) -> int:
        """Tokens with which the last two prompts begin alike, in whole blocks."""
        shared: list[Message] = []
        for one, other in zip(*self._prompts[-2:], strict=False):
            text = commonprefix([str(one["content"]), str(other["content"])])  # noqa: RUF071 # letters are meant
            if one["role"] == other["role"] and text:
                shared.append({"role": one["role"], "content": text})
            if one != other:
                break
        x: Message = {"role": "user", "content": "x"}
        ends = await self.count_tokens((x, x)) - await self.count_tokens((x,)) - 1  # what a template puts after a text
        alike = max(0, await self.count_tokens(tuple(shared)) - ends) if shared else 0
        return alike // self._block * self._block


async def main(arguments: Sequence[str]) -> None:
    kind, model, *_ = [*arguments, "scripted", "smollm2-135m-instruct"] if len(arguments) < 2 else arguments
    if not arguments or kind == "scripted":
        await scripted()
        await turns("scripted", "script", {**_SCRIPT, "reply_tokens": 60, "itl_s": 0.002, "ttft_s": 0.02})
        return
    model = arguments[1] if len(arguments) > 1 else "smollm2-135m-instruct"
    await real(kind, model, tuple(_MODES), 200)
    await turns(kind, model, _REAL[kind])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
