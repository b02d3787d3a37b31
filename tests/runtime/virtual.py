"""Time that passes as fast as it can: an event loop whose clock jumps to the next thing that is due."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from moa_ray.engines import Chunk, EngineInfo, EngineRequest, Scripted, ScriptedOptions
from moa_ray.engines.protocol import Usage
from moa_ray.errors import EngineUnavailable
from moa_ray.graph import Message

T = TypeVar("T")


class _Jump(selectors.DefaultSelector):
    """Waits for nothing; moves the clock of its loop by as long as it was to wait."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for ever"
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


def simulate(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class Replicas:
    """An `Engine` of several scripted replicas, which take turns; `kill` breaks off what one is doing.

    Args:
        options: What each replica plays.
        jitter_s: Mean of what is added to each time to first token, drawn from an exponential distribution.
    """

    def __init__(self, options: Sequence[ScriptedOptions], jitter_s: float = 0.0) -> None:
        self._jitter_s = jitter_s
        self._random = random.Random(0)
        self.replicas = {f"r{n}": Scripted(given) for n, given in enumerate(options, start=1)}
        self.requests: list[tuple[str, EngineRequest]] = []
        self._running: dict[str, set[asyncio.Event]] = {name: set() for name in self.replicas}
        self._turn = 0

    @property
    def decoded(self) -> int:
        return sum(replica.decoded for replica in self.replicas.values())

    @property
    def active(self) -> int:
        return sum(replica.active for replica in self.replicas.values())

    def kill(self, name: str) -> None:
        """What a SIGKILL does to the calls on a replica; another one takes its place at once."""
        for death in self._running[name]:
            death.set()

    async def info(self) -> EngineInfo:
        return await self.replicas["r1"].info()

    async def count_tokens(self, messages: tuple[Message, ...]) -> int:
        return await self.replicas["r1"].count_tokens(messages)

    async def warm(self, request: EngineRequest) -> Usage:
        return Usage()

    async def close(self) -> None:
        pass

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        names = [name for name in self.replicas if name not in request.avoid] or list(self.replicas)
        self._turn += 1
        name = names[self._turn % len(names)]
        self.requests.append((name, request))
        yield Chunk(replica=name)
        if self._jitter_s:
            await asyncio.sleep(self._random.expovariate(1 / self._jitter_s))
        death = asyncio.Event()
        self._running[name].add(death)
        dying = asyncio.ensure_future(death.wait())
        try:
            async with aclosing(self.replicas[name].stream(replace(request, flush_s=0))) as chunks:
                while True:
                    chunk = await _first_of(asyncio.ensure_future(anext(chunks)), dying)
                    if chunk is None:
                        raise EngineUnavailable(f"{name} died")
                    yield chunk
                    if chunk.finish_reason:
                        return
        finally:
            dying.cancel()
            self._running[name].discard(death)


async def _first_of(chunk: asyncio.Future[Chunk], dying: asyncio.Future[Any]) -> Chunk | None:
    """The chunk, or None if its replica dies first."""
    try:
        await asyncio.wait({chunk, dying}, return_when=asyncio.FIRST_COMPLETED)
        return None if dying.done() else await chunk
    finally:
        chunk.cancel()
        await asyncio.gather(chunk, return_exceptions=True)
