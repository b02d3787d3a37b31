from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from math import inf

from moa_ray.engines import Chunk, Usage
from moa_ray.engines._coalesce import coalesce

_END = Chunk(finish_reason="stop", usage=Usage(1, 3))


async def _tokens(*pauses: float) -> AsyncGenerator[Chunk, None]:
    for number, pause in enumerate(pauses):
        await asyncio.sleep(pause)
        yield Chunk(f"{number} ", 1)
    yield _END


async def test_without_holding_back_every_token_travels_by_itself() -> None:
    texts = [chunk.text async for chunk in coalesce(_tokens(0, 0, 0), 0)]
    assert texts == ["0 ", "1 ", "2 ", ""]


async def test_an_infinite_wait_gives_one_message_with_text_usage_and_ttft() -> None:
    (only,) = [chunk async for chunk in coalesce(_tokens(0.02, 0, 0.02), inf)]
    assert (only.text, only.tokens, only.usage) == ("0 1 2 ", 3, Usage(1, 3))
    assert only.ttft_s is not None and only.ttft_s >= 0.02


async def test_the_first_token_is_never_held_back_and_no_text_is_lost() -> None:
    chunks = [chunk async for chunk in coalesce(_tokens(0, 0, 0, 0), 60)]
    assert [chunk.text for chunk in chunks] == ["0 ", "1 2 3 "]
    assert sum(chunk.tokens for chunk in chunks) == 4


async def test_a_bound_of_tokens_holds_however_long_the_wait_may_be() -> None:
    chunks = [chunk async for chunk in coalesce(_tokens(0, 0, 0, 0, 0), inf, 2)]
    assert [chunk.text for chunk in chunks] == ["0 1 ", "2 3 ", "4 "]
    assert chunks[-1].ttft_s is not None


async def test_closing_it_closes_the_engines_stream() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[Chunk, None]:
        try:
            while True:
                yield Chunk("x", 1)
        finally:
            closed.set()

    stream = coalesce(endless(), 0)
    await anext(stream)
    await stream.aclose()
    assert closed.is_set()
