"""Fewer, larger messages: what a reader across an actor boundary wants of a token stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from math import inf, isinf

from moa_ray.engines.protocol import Chunk


async def coalesce(
    chunks: AsyncGenerator[Chunk, None], flush_s: float, flush_tokens: int | None = None
) -> AsyncGenerator[Chunk, None]:
    """Join chunks that arrive within `flush_s` seconds of the last one passed on, up to `flush_tokens` tokens.

    The first text passes at once, so the time to the first token is untouched, unless `flush_s` is infinite: then
    only tokens count. Where text was held back, the last chunk has the `ttft_s` that its reader cannot see.
    """
    most = inf if flush_tokens is None else flush_tokens
    clock = asyncio.get_running_loop().time
    received = clock()
    first: float | None = None
    last = -flush_s
    held: list[Chunk] = []
    tokens = 0
    async with aclosing(chunks) as source:
        async for chunk in source:
            now = clock()
            if first is None and (chunk.text or chunk.tool_calls):
                first = now
            held.append(chunk)
            tokens += chunk.tokens
            if chunk.finish_reason is not None:
                ttft_s = chunk.ttft_s if chunk.ttft_s is not None else (first or now) - received
                yield replace(joined(held), ttft_s=ttft_s)
                return
            if (now - last >= flush_s and not isinf(flush_s)) or tokens >= most:
                yield joined(held)
                held.clear()
                tokens = 0
                last = now


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks of one answer, at least one, as one chunk; what only an end has is that of the last."""
    logprobs = [chunk.logprob for chunk in chunks if chunk.logprob is not None]
    return replace(
        chunks[-1],
        text="".join(chunk.text for chunk in chunks),
        tokens=sum(chunk.tokens for chunk in chunks),
        tool_calls=tuple(call for chunk in chunks for call in chunk.tool_calls),
        logprob=sum(logprobs) if logprobs else None,
    )
