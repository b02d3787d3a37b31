"""The way into the runtime: requests in, events out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing

from moa_ray.engines.protocol import Engine
from moa_ray.gates import Gate
from moa_ray.graph import Graph, Message, conversation
from moa_ray.runtime.events import Event
from moa_ray.runtime.health import Health
from moa_ray.runtime.ledger import Ledger, RunResult
from moa_ray.runtime.plan import Plan, RunOptions
from moa_ray.runtime.run import Run


class Runner:
    """Runs requests through one graph over its engines; between two requests it holds the engines' health alone.

    Args:
        graph: The graph.
        engines: An engine for every name in `graph.engines`.
        health: What is known of the engines already; nothing where not given.
        gate: Who picks the agents, and the seconds that it may take; not given: everybody is asked.
    """

    def __init__(
        self,
        graph: Graph,
        engines: Mapping[str, Engine],
        health: Health | None = None,
        gate: tuple[Gate, float] | None = None,
    ) -> None:
        self.graph = graph
        self.engines = engines
        self.gate = gate
        self.health = health if health is not None else Health()

    async def batches(
        self,
        prompt: str | Iterable[Message],
        options: RunOptions | None = None,
        ended: Callable[[Ledger], None] | None = None,
    ) -> AsyncGenerator[list[Event], None]:
        """Run one request, with events that come close together in one list.

        Text of the answer is passed on at once, all else a moment later. The last event of the last
        list is always `run.finished`. Closing the iterator cancels every engine call of the run. `ended` gets the
        account of it all, also of what was cut off then, which no event is read of.

        Raises:
            RequestError: If the prompt is empty or malformed.
            MoARayError: After `run.finished`, if the run failed.
        """
        plan = Plan.of(self.graph, conversation(prompt), options or RunOptions())
        run = Run(plan, self.engines, self.health, self.gate)
        task = asyncio.create_task(run.execute())
        task.add_done_callback(lambda _: run.journal.end())
        try:
            while batch := await run.journal.batch():
                yield batch
            await task
        finally:
            task.cancel()
            await asyncio.wait({task})
            if ended is not None:
                ended(run.journal.ledger)

    async def stream(
        self, prompt: str | Iterable[Message], options: RunOptions | None = None
    ) -> AsyncGenerator[Event, None]:
        """`batches`, one event at a time."""
        async with aclosing(self.batches(prompt, options)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def run(self, prompt: str | Iterable[Message], options: RunOptions | None = None) -> RunResult:
        """Run one request to its end. Raises as `stream` does."""
        async with aclosing(self.stream(prompt, options)) as events:
            return RunResult.of([event async for event in events])
