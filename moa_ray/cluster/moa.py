"""The Python interface: one model made of a graph, running on a Ray cluster."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import aclosing
from math import inf
from os import PathLike
from types import TracebackType
from typing import Any
from uuid import uuid4

from ray import serve

from moa_ray.cluster.app import deployment_of, router_of
from moa_ray.cluster.calls import Sending
from moa_ray.cluster.deploy import Progress, deploy
from moa_ray.cluster.engine_actor import HandleEngine
from moa_ray.cluster.session import Session
from moa_ray.engines import registry as engine_kinds
from moa_ray.engines.protocol import Engine
from moa_ray.gates import registry as gate_kinds
from moa_ray.graph import Graph, Message, conversation, load
from moa_ray.runtime import Event, RunOptions, RunResult


class MoA:
    """A graph, deployed for as long as this object lives.

    Joins the Ray cluster at `address` (or `RAY_ADDRESS`), or starts a local one; deploys the graph as a
    Serve application of its own name and a random ending; takes down, on `close`, only what it started.

    Args:
        graph: The graph.
        address: A running Ray cluster, `host:port` or `auto`.
        progress: Told which engines are ready while they start.

    Raises:
        ClusterError: If the cluster cannot be reached, or an engine does not start.
        ResourcesShort: If an engine finds no place in the cluster.
    """

    def __init__(self, graph: Graph, *, address: str | None = None, progress: Progress | None = None) -> None:
        engine_kinds.check(graph)
        gate_kinds.check(graph)
        self.graph = graph
        self.app = f"{graph.spec.name}-{uuid4().hex[:6]}"
        self._closed = False
        self._session = Session(address)
        try:
            deploy([graph], self.app, may_grow=self._session.grows, progress=progress)
            router: Any = serve.get_deployment_handle(router_of(graph.spec.name), self.app)
        except BaseException:
            self._session.close()
            raise
        self._handle = router.options(method_name="stream", stream=True)
        atexit.register(self.close)

    @classmethod
    def from_yaml(cls, path: str | PathLike[str], *, address: str | None = None) -> MoA:
        """Load the graph in `path` and deploy it.

        Raises:
            SpecError: If the file does not describe a graph; with file, line and key.
        """
        return cls(load(path), address=address)

    def run(self, prompt: str | Iterable[Message]) -> RunResult:
        """Answer `prompt`, or the last message of a conversation.

        Raises:
            RequestError: If the prompt is empty or malformed.
            QuorumNotMet: If too few agents answered.
            EngineError: If the aggregator failed.
            DeadlineExceeded: If the policy's deadline passed.
        """
        return RunResult.of(self.events(prompt))

    def events(
        self, prompt: str | Iterable[Message], options: RunOptions | None = None
    ) -> Generator[Event, None, None]:
        """`stream` for code without an event loop. Closing the generator cancels the run."""
        messages, sending = conversation(prompt), Sending()
        while not sending.done:
            response: Any = self._handle.remote(messages, options or RunOptions())
            with sending.reading(response):
                for batch in response:
                    sending.passes_on(batch)
                    yield from batch

    async def stream(
        self, prompt: str | Iterable[Message], options: RunOptions | None = None
    ) -> AsyncGenerator[Event, None]:
        """Answer `prompt`, telling everything that happens; the last event is `run.finished`.

        Closing the generator cancels the run. Raises as `run` does, after the last event.
        """
        messages, sending = conversation(prompt), Sending()
        while not sending.done:
            response: Any = self._handle.remote(messages, options or RunOptions())
            with sending.reading(response):
                async for batch in response:
                    sending.passes_on(batch)
                    for event in batch:
                        yield event

    def engine(self, name: str) -> Engine:
        """One of the graph's engines, as its router sees it."""
        handle: Any = serve.get_deployment_handle(deployment_of(self.graph.spec.name, name), self.app)
        return HandleEngine(name, handle)

    async def answer(self, prompt: str | Iterable[Message]) -> RunResult:
        """`run` for code with an event loop."""
        async with aclosing(self.stream(prompt, RunOptions(answer_flush_s=inf))) as events:
            return RunResult.of([event async for event in events])

    def close(self) -> None:
        """Take the application down, and the cluster if this object started it. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if not self._session.owned:  # our own cluster goes down whole, and faster
            serve.delete(self.app)
        self._session.close()

    def __enter__(self) -> MoA:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> MoA:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)
