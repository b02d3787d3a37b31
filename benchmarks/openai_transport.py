"""CPU of one streamed call of 64 tokens to an OpenAI-compatible endpoint, by how its stream is read.

Floor: the same request on the bare HTTP client. Run: `python -m benchmarks.openai_transport`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import httpx2
import openai

from moa_ray.engines import EngineRequest
from moa_ray.engines.openai_api import OpenAIEngine, OpenAIOptions

_CALLS, _AT_ONCE = 100, 10
_MESSAGES = ({"role": "user", "content": "why?"},)


async def cpu_ms(call: Callable[[], Awaitable[int]]) -> float:
    """Milliseconds of this process's CPU that a call takes."""
    tokens = await asyncio.gather(*(call() for _ in range(_AT_ONCE)))
    assert set(tokens) == {64}, "every way must read the whole answer"
    started = time.process_time()
    for _ in range(_CALLS // _AT_ONCE):
        await asyncio.gather(*(call() for _ in range(_AT_ONCE)))
    return (time.process_time() - started) / _CALLS * 1e3


async def measure(url: str) -> None:
    sdk = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    bare = httpx2.AsyncClient()
    engine = OpenAIEngine("m", OpenAIOptions(base_url=url))

    async def of_the_sdk() -> int:
        stream = await sdk.chat.completions.create(model="m", messages=_MESSAGES, stream=True)  # type: ignore[call-overload]
        return sum([bool(chunk.choices[0].delta.content) async for chunk in stream])

    async def of_the_engine() -> int:
        return sum([bool(chunk.text) async for chunk in engine.stream(EngineRequest("r", _MESSAGES))])  # type: ignore[arg-type]

    async def of_the_bare_client() -> int:
        body = {"model": "m", "messages": _MESSAGES, "stream": True}
        async with bare.stream("POST", f"{url}/chat/completions", json=body) as response:
            events = [json.loads(line[6:]) async for line in response.aiter_lines() if line.startswith("data: {")]
        return sum(bool(event["choices"][0]["delta"].get("content")) for event in events)

    floor = await cpu_ms(of_the_bare_client)
    print("CPU of one streamed call of 64 tokens")
    for name, call in (("openai SDK's own stream", of_the_sdk), ("moa-ray's openai engine", of_the_engine)):
        taken = await cpu_ms(call)
        print(f"  {name:<26} {taken:6.2f} ms  {taken / floor:5.2f} x the bare HTTP client ({floor:.2f} ms)")
    await asyncio.gather(sdk.close(), bare.aclose(), engine.close())


def main() -> None:
    command = [sys.executable, "-m", "tests.engines.endpoint"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as endpoint:
        assert endpoint.stdout is not None
        try:
            asyncio.run(measure(endpoint.stdout.readline().strip()))
        finally:
            endpoint.kill()


if __name__ == "__main__":
    main()
