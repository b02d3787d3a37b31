from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from moa_ray.engines import Chunk, EngineRequest, Sampling, Scripted, ScriptedOptions
from moa_ray.errors import ContextOverflow, EngineUnavailable


def _request(text: str = "hello there", agent: str = "a", **sampling: Any) -> EngineRequest:
    return EngineRequest("id", ({"role": "user", "content": text},), Sampling(**sampling), agent=agent)


async def _all(engine: Scripted, request: EngineRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.stream(request)]


def _engine(**options: Any) -> Scripted:
    return Scripted(ScriptedOptions.model_validate(options))


async def test_the_reply_fills_in_agent_call_number_and_last_message_and_nothing_else() -> None:
    engine = _engine(reply="{agent}/{call}: {prompt} {other}")
    await _all(engine, _request())
    assert "".join(chunk.text for chunk in await _all(engine, _request())) == "a/2: hello there {other}"


async def test_a_text_with_braces_is_not_filled_in_twice() -> None:
    (chunk, _) = await _all(_engine(reply="{prompt}"), _request("{call}"))
    assert chunk.text == "{call}"


async def test_the_same_script_gives_the_same_chunks() -> None:
    first, second = [await _all(_engine(reply="one two"), _request()) for _ in range(2)]
    assert first == second
    assert [chunk.text for chunk in first] == ["one ", "two", ""]


async def test_max_tokens_cuts_the_reply_and_says_length() -> None:
    chunks = await _all(_engine(reply_tokens=9), _request(max_tokens=4))
    assert "".join(chunk.text for chunk in chunks).split() == ["1", "2", "3", "4"]
    assert chunks[-1].finish_reason == "length"


@pytest.mark.parametrize("begun", ["1 ", "1 2 3 ", "1 2 3 4 5 "])
async def test_an_answer_goes_on_after_what_there_is_of_it(begun: str) -> None:
    engine = _engine(reply_tokens=5)
    *pieces, last = await _all(engine, replace(_request(), continue_from=begun))
    assert begun + "".join(piece.text for piece in pieces) == "1 2 3 4 5 "
    assert last.usage is not None and last.usage.completion_tokens == len(pieces)


async def test_the_prefix_cache_counts_the_longest_common_prefix() -> None:
    engine = _engine()
    usages = [(await _all(engine, _request(text)))[-1].usage for text in ("a b c", "a b d", "x y", "a b c d")]
    assert [usage.cached_tokens for usage in usages if usage] == [0, 3, 1, 4]


async def test_a_warmed_prompt_is_cached() -> None:
    engine = _engine()
    assert (await engine.warm(_request("a b c"))).cached_tokens == 0
    usage = (await _all(engine, _request("a b c d")))[-1].usage
    assert usage and (usage.prompt_tokens, usage.cached_tokens) == (5, 4)


async def test_a_fault_strikes_the_calls_it_names_and_no_others() -> None:
    engine = _engine(faults=[{"agent": "a", "first": 2, "times": 1, "after_tokens": 1}], reply="one two")
    await _all(engine, _request())
    received: list[Chunk] = []
    with pytest.raises(EngineUnavailable):
        async for chunk in engine.stream(_request()):
            received.append(chunk)
    assert [chunk.text for chunk in received] == ["one "]
    await _all(engine, _request())
    await _all(engine, _request(agent="b"))


async def test_concurrency_bounds_the_calls_that_are_played_at_once() -> None:
    engine = _engine(concurrency=1, ttft_s=0.02)
    first, second = (asyncio.create_task(_all(engine, _request(agent=name))) for name in "ab")
    await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
    assert first.done() and not second.done()
    await second


async def test_a_closed_stream_decodes_no_further() -> None:
    engine = _engine(itl_s=0.001, reply_tokens=1000)
    stream = engine.stream(_request())
    await anext(stream)
    await stream.aclose()
    decoded = engine.decoded
    await asyncio.sleep(0.02)
    assert (engine.decoded, engine.active) == (decoded, 0)


async def test_a_prompt_beyond_the_window_overflows() -> None:
    with pytest.raises(ContextOverflow, match="takes 6 of 5 tokens"):
        await _all(_engine(context_window=5), _request("one two three four five"))


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValidationError):
        _engine(tfft_s=1)


async def test_a_whole_answer_is_the_joined_stream() -> None:
    options: dict[str, Any] = {"reply_tokens": 9, "ttft_s": 0.01, "itl_s": 0.001, "prefill_s_per_token": 0.001}
    pieces = await _all(_engine(**options), _request(max_tokens=5))
    engine = _engine(**options)
    whole = await engine.complete(_request(max_tokens=5))
    assert whole.text == "".join(piece.text for piece in pieces) and whole.tokens == engine.decoded == 5
    assert (whole.finish_reason, whole.usage) == (pieces[-1].finish_reason, pieces[-1].usage)
    assert whole.prefill_s == pieces[-1].prefill_s and whole.ttft_s is not None and whole.ttft_s >= 0.013


async def test_a_whole_answer_that_is_cut_off_stops_the_decoding() -> None:
    engine = _engine(reply_tokens=1000, itl_s=0.01)
    answering = asyncio.create_task(engine.complete(_request()))
    await asyncio.sleep(0.1)
    answering.cancel()
    await asyncio.wait({answering})
    decoded = engine.decoded
    assert 1 < decoded < 1000 and engine.active == 0
    await asyncio.sleep(0.03)
    assert engine.decoded == decoded


async def test_a_fault_strikes_a_whole_answer_too() -> None:
    engine = _engine(reply_tokens=9, faults=[{"after_tokens": 4}])
    with pytest.raises(EngineUnavailable):
        await engine.complete(_request())
    assert (engine.decoded, engine.active) == (4, 0)
