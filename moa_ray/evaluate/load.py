"""Load: requests in a closed loop, by so many callers, or in an open one, at a rate whatever the answers do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import accumulate, pairwise

from moa_ray.engines.protocol import Chunk, Usage
from moa_ray.errors import EngineTimeout, MoARayError
from moa_ray.graph import Message

Ask = Callable[[tuple[Message, ...]], AsyncGenerator[Chunk, None]]
"""Sends one conversation."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. All times are in seconds.

    Args:
        started_s: When it was to be sent, from the load's start.
        sent_late_s: How much later it was sent, since this process was busy.
        ttft_s: From when it was to be sent to its first token; None where there was none.
        itl_s: Between one piece of the answer and the next.
        e2el_s: From when it was to be sent to the end of its answer.
        usage: Its tokens.
        error: Why it failed, by kind; "" where it did not.
        message: The same in words.
    """

    started_s: float
    sent_late_s: float
    ttft_s: float | None
    itl_s: tuple[float, ...]
    e2el_s: float
    usage: Usage
    error: str = ""
    message: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for fewer than two tokens."""
        if self.ttft_s is None or self.usage.completion_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.usage.completion_tokens - 1)


INTERRUPTED = "Interrupted"
"""Kind of error of a request that was in flight when the load was stopped."""

Ended = Callable[[Sample], None]
"""Told of each request that ended."""


def arrivals(rate: float, count: int, *, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """When `count` requests are to be sent, in seconds from the start; the first at 0.

    Args:
        rate: Requests a second on average.
        count: How many.
        burstiness: Shape of the gamma distribution of the pauses: 1 is a Poisson process, less is burstier, much more
            is nearly regular; as `vllm bench serve` has it.
        seed: The same seed gives the same times.
    """
    dice = random.Random(seed)
    pauses = [dice.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count - 1)]
    return [0.0, *accumulate(pauses)][:count]


async def open_loop(
    ask: Ask, prompts: Sequence[tuple[Message, ...]], times: Sequence[float], *, timeout_s: float, ended: Ended
) -> float:
    """Send each prompt at its time, whatever became of those before; the seconds until all ended.

    Latency counts from the time at which a request was to be sent: where the endpoint, or this process, stalls, those
    that should have been sent meanwhile have waited (Tene's coordinated omission is avoided).
    """
    clock = asyncio.get_running_loop().time
    begin = clock()

    async def send(prompt: tuple[Message, ...], at: float) -> None:
        await asyncio.sleep(begin + at - clock())
        await _sample(ask, prompt, begin, begin + at, timeout_s, ended)

    await _together(send(prompt, at) for prompt, at in zip(prompts, times, strict=True))
    return clock() - begin


async def closed_loop(
    ask: Ask, prompts: Sequence[tuple[Message, ...]], callers: int, *, timeout_s: float, ended: Ended
) -> float:
    """`callers` of whom each sends its next prompt when its last one ended; the seconds until all ended."""
    clock = asyncio.get_running_loop().time
    begin, waiting = clock(), iter(prompts)

    async def call() -> None:
        for prompt in waiting:
            await _sample(ask, prompt, begin, clock(), timeout_s, ended)

    await _together(call() for _ in range(callers))
    return clock() - begin


async def _together(work: Iterable[Coroutine[None, None, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(each)


async def _sample(
    ask: Ask, prompt: tuple[Message, ...], begin: float, due: float, timeout_s: float, ended: Ended
) -> None:
    """One request. One that is cancelled counts too: those in flight are the slow ones."""
    clock = asyncio.get_running_loop().time
    sent = clock()
    pieces: list[float] = []
    usage = Usage()

    def end(error: str = "", message: str = "") -> None:
        ended(
            Sample(
                started_s=due - begin,
                sent_late_s=sent - due,
                ttft_s=pieces[0] - due if pieces else None,
                itl_s=tuple(later - earlier for earlier, later in pairwise(pieces)),
                e2el_s=clock() - due,
                usage=usage,
                error=error,
                message=message,
            )
        )

    try:
        async with asyncio.timeout(timeout_s), aclosing(ask(prompt)) as chunks:
            async for chunk in chunks:
                if chunk.text or chunk.tool_calls:
                    pieces.append(clock())
                usage = chunk.usage or usage
    except TimeoutError:
        end(EngineTimeout.__name__, f"no whole answer within {timeout_s:g} s")
    except MoARayError as refused:
        end(type(refused).__name__, refused.message)
    except asyncio.CancelledError:
        end(INTERRUPTED, "not answered when the load was stopped")
        raise
    else:
        end()
