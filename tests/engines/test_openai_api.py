from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from email.utils import formatdate
from time import time
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from moa_ray.engines import Chunk, EngineRequest, Sampling, Usage
from moa_ray.engines.openai_api import OpenAIEngine, OpenAIOptions, _retry_after_s
from moa_ray.errors import (
    ContextOverflow,
    EngineError,
    EngineOverloaded,
    EngineRefused,
    EngineTimeout,
    EngineUnavailable,
)
from tests.engines.endpoint import KEY, WORDS, Endpoint, serving


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Endpoint]]:
    with serving() as endpoint:
        yield endpoint


@pytest.fixture
async def make(served: tuple[str, Endpoint]) -> AsyncIterator[Any]:
    """`make(model, **options)`: an engine of the endpoint."""
    engines = []

    def make(model: str, **options: Any) -> OpenAIEngine:
        engine = OpenAIEngine(model, OpenAIOptions(**{"base_url": served[0], "api_key": SecretStr(KEY), **options}))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        await engine.close()


def request(text: str = "why?", **sampling: Any) -> EngineRequest:
    return EngineRequest("r1", ({"role": "user", "content": text},), Sampling(**sampling))


async def chunks(engine: OpenAIEngine, asked: EngineRequest | None = None) -> list[Chunk]:
    return [chunk async for chunk in engine.stream(asked or request())]


async def test_the_text_comes_whole_and_the_last_chunk_tells_the_usage(make: Any) -> None:
    *text, last = await chunks(make("m"))
    assert "".join(chunk.text for chunk in text) == "".join(WORDS)
    assert last.finish_reason == "stop" and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (11, 64, 5)
    assert (await chunks(make("long")))[-1].finish_reason == "length"


async def test_without_usage_from_the_endpoint_it_is_estimated(make: Any) -> None:
    last = (await chunks(make("uncounted")))[-1]
    assert last.usage is not None and last.usage.completion_tokens == len(WORDS) and last.usage.prompt_tokens > 0


async def test_an_answer_is_continued_by_an_assistant_message_where_the_endpoint_can(
    make: Any, served: tuple[str, Endpoint]
) -> None:
    assert not (await make("m").info()).continues
    engine = make("m", continues=True, continue_body={"continue_final_message": True})
    assert (await engine.info()).continues
    await chunks(engine, replace(request(), continue_from="w0 "))
    body, _ = served[1].requests[-1]
    assert body["messages"][1:] == [{"role": "assistant", "content": "w0 "}]
    assert body["continue_final_message"] is True
    await chunks(engine)
    assert "continue_final_message" not in served[1].requests[-1][0]


async def test_an_endpoint_is_warmed_by_one_token_where_it_keeps_prefixes_and_not_at_all_elsewhere(
    make: Any, served: tuple[str, Endpoint]
) -> None:
    asked = len(served[1].requests)
    assert await make("m").warm(request()) == Usage() and len(served[1].requests) == asked
    engine = make("m", prefix_cache=True)
    assert (await engine.info()).prefix_cache
    assert (await engine.warm(request(max_tokens=99))).prompt_tokens > 0
    assert served[1].requests[-1][0]["max_tokens"] == 1


async def test_the_request_holds_what_was_set_and_nothing_else(make: Any, served: tuple[str, Endpoint]) -> None:
    engine = make("m", headers={"X-Team": SecretStr("blue")}, extra_body={"top_k": 3})
    await chunks(engine, request(temperature=0.0, max_tokens=7, seed=1, stop=("END",)))
    body, headers = served[1].requests[-1]
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "why?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "max_tokens": 7,
        "seed": 1,
        "stop": ["END"],
        "top_k": 3,
    }
    assert headers["authorization"] == f"Bearer {KEY}" and headers["x-team"] == "blue"


@pytest.mark.parametrize(
    ("model", "kind", "says", "retry_after_s"),
    [
        ("e401", EngineRefused, r"answered 401: Incorrect API key provided: \*\*\*", None),
        ("e404", EngineRefused, "answered 404: The model `e404` does not exist", None),
        ("e400", EngineRefused, "top_p is out of range", None),
        ("window", ContextOverflow, "maximum context length", None),
        ("e429", EngineOverloaded, "slow down", 7.0),
        ("e503", EngineUnavailable, "warming up", 3.0),
        ("e500", EngineUnavailable, "oops", None),
        ("html", EngineUnavailable, "ended before the answer", None),
        ("cut", EngineUnavailable, "ended before the answer", None),
        ("errs", EngineUnavailable, "the engine died", None),
        ("number", EngineUnavailable, "no chat completion chunk", None),
        ("words", EngineUnavailable, "no chat completion chunk", None),
        ("breaks", EngineUnavailable, "the connection to .* broke", None),
    ],
)
async def test_a_failure_is_told_by_its_kind_and_never_tells_the_key(
    make: Any, model: str, kind: type[EngineError], says: str, retry_after_s: float | None
) -> None:
    with pytest.raises(kind, match=says) as caught:
        await chunks(make(model))
    assert type(caught.value) is kind
    assert caught.value.retry_after_s == retry_after_s
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("model", ["silent", "stalls"])
async def test_silence_ends_after_the_idle_timeout(make: Any, model: str) -> None:
    with pytest.raises(EngineTimeout, match=r"was silent for 0\.2 s"):
        await chunks(make(model, idle_timeout_s=0.2))


async def test_an_endpoint_that_nobody_serves_is_told_with_its_address(make: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(EngineUnavailable, match=rf"cannot reach http://127\.0\.0\.1:{port}/v1: "):
        await chunks(make("m", base_url=f"http://127.0.0.1:{port}/v1"))


async def test_leaving_the_stream_stops_the_endpoint(make: Any, served: tuple[str, Endpoint]) -> None:
    async with aclosing(make("slow").stream(request())) as stream:
        async for _ in stream:
            break
        assert served[1].streaming == 1
    async with asyncio.timeout(10):
        while served[1].streaming:
            await asyncio.sleep(0.01)


async def test_tokens_are_estimated_and_info_is_what_the_options_say(make: Any) -> None:
    engine = make("m", context_window=99)
    info = await engine.info()
    assert (info.model, info.context_window) == ("m", 99)
    short, long = [await engine.count_tokens(request("word " * n).messages) for n in (10, 100)]
    assert 0 < short < long


def test_wrong_options_and_secrets_in_reprs() -> None:
    with pytest.raises(ValidationError, match="base_url"):
        OpenAIOptions(base_url="localhost:8000")
    assert KEY not in repr(OpenAIOptions(api_key=SecretStr(KEY)))


def test_retry_after_is_a_number_or_a_date() -> None:
    def seconds(value: str) -> float | None:
        return _retry_after_s({"retry-after": value})

    assert _retry_after_s({}) is None and seconds("x") is None
    assert seconds("2.5") == 2.5 and seconds("-1") == 0
    in_an_hour = seconds(formatdate(time() + 3600, usegmt=True))
    assert in_an_hour is not None and 0 < in_an_hour <= 3600
