"""Two attempts at one call: whichever begins first answers, the other is cut off (Dean and Barroso 2013)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from moa_ray.engines.protocol import Chunk, Usage
from moa_ray.errors import EngineError, EngineUnavailable


@dataclass(slots=True, eq=False)
class Attempt:
    """A call on its way to an engine.

    Args:
        number: From 1.
        engine: Name of the engine.
        started: When, by the loop's clock.
        replica: Who answers; "" until it is known.
        tokens: Completion tokens received.
        received: In so many pieces.
        ttft_s: Seconds to the first of them.
        chunks: What the engine sends.
    """

    number: int
    engine: str
    started: float
    replica: str = ""
    tokens: int = 0
    received: int = 0
    ttft_s: float | None = None
    chunks: AsyncGenerator[Chunk, None] = field(init=False, repr=False)

    @property
    def usage(self) -> Usage:
        """What has been seen of its tokens."""
        return Usage(completion_tokens=self.tokens)

    async def pieces(self) -> AsyncGenerator[Chunk, None]:
        """Its chunks that hold something of the answer, or its end."""
        async with aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                self.replica = chunk.replica or self.replica
                if chunk.text or chunk.tool_calls or chunk.finish_reason is not None:
                    yield chunk
                if chunk.finish_reason is not None:
                    return
        raise EngineUnavailable("the stream ended without saying why")


async def race(
    first: Attempt,
    after_s: float,
    second: Callable[[], Awaitable[Attempt | None]],
    lost: Callable[[Attempt, EngineError | None], None],
) -> AsyncGenerator[tuple[Attempt, Chunk], None]:
    """Pieces of the attempt that begins first, with that attempt.

    Args:
        first: The attempt that runs.
        after_s: How long it may take to begin, in seconds.
        second: Starts its rival; None where there is to be none.
        lost: Told of an attempt that was cut off, or that failed while its rival ran.

    Raises:
        EngineError: That of the last attempt, if none of them can begin, or of the winner later.
    """
    streams = {first: first.pieces()}
    racing = {asyncio.ensure_future(anext(streams[first])): first}
    try:
        done, _ = await asyncio.wait(racing, timeout=after_s)
        if not done and (rival := await second()) is not None:
            streams[rival] = rival.pieces()
            racing[asyncio.ensure_future(anext(streams[rival]))] = rival
        while True:
            done, _ = await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
            begun = next((task for task in done if task.exception() is None), None)
            if begun is not None:
                break
            for task in done:
                if len(racing) == 1:
                    await task  # raises
                lost(racing.pop(task), _error(task))
        winner, piece = racing.pop(begun), begun.result()
        for task, attempt in racing.items():
            lost(attempt, _error(task))
        await _cut_off(racing)
        yield winner, piece
        async for piece in streams[winner]:
            yield winner, piece
    finally:
        await _cut_off(racing)
        for stream in streams.values():
            await stream.aclose()


def _error(task: asyncio.Task[Chunk]) -> EngineError | None:
    error = task.exception() if task.done() else None
    if error is not None and not isinstance(error, EngineError):
        raise error
    return error


async def _cut_off(racing: dict[asyncio.Task[Chunk], Attempt]) -> None:
    for task in racing:
        task.cancel()
    await asyncio.gather(*racing, return_exceptions=True)
    racing.clear()
