"""Fewer, larger messages: what a reader across an actor boundary wants of a token stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from math import inf, isinf
from typing import Any

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
    text: list[str] = []
    tools: list[dict[str, Any]] = []
    tokens = 0
    logprob: float | None = None
    async with aclosing(chunks) as source:
        async for chunk in source:
            now = clock()
            if first is None and (chunk.text or chunk.tool_calls):
                first = now
            text.append(chunk.text)
            tools += chunk.tool_calls
            tokens += chunk.tokens
            if chunk.logprob is not None:
                logprob = (logprob or 0.0) + chunk.logprob
            if chunk.finish_reason is not None:
                ttft_s = chunk.ttft_s if chunk.ttft_s is not None else (first or now) - received
                whole = "".join(text)
                yield replace(chunk, text=whole, tokens=tokens, ttft_s=ttft_s, tool_calls=tuple(tools), logprob=logprob)
                return
            if (now - last >= flush_s and not isinf(flush_s)) or tokens >= most:
                yield Chunk("".join(text), tokens, tool_calls=tuple(tools), logprob=logprob)
                text.clear()
                tools.clear()
                tokens, logprob = 0, None
                last = now
