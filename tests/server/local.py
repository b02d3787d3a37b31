"""The HTTP edge over graphs in this process: a real server, scripted engines, no Ray."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import uvicorn

from moa_ray.engines import Scripted
from moa_ray.graph import Graph, Message
from moa_ray.runtime import Event, Runner, RunOptions
from moa_ray.server import ServerSettings, create_app
from tests.runtime.panels import panel


class LocalBackend:
    """A `Backend` over runners."""

    def __init__(self, *runners: Runner) -> None:
        self.runners = {runner.graph.spec.name: runner for runner in runners}
        self.down: list[str] = []

    @property
    def graphs(self) -> tuple[str, ...]:
        return tuple(self.runners)

    async def graph(self, name: str) -> Graph:
        return self.runners[name].graph

    async def stream(
        self, graph: str, messages: list[Message], options: RunOptions
    ) -> AsyncGenerator[list[Event], None]:
        async with aclosing(self.runners[graph].batches(messages, options)) as batches:
            async for batch in batches:
                yield batch

    async def unready(self) -> list[str]:
        return self.down


class Served:
    """A running server: its base URL, backend and the scripted engine of its panel."""

    def __init__(self, url: str, backend: LocalBackend, engine: Scripted) -> None:
        self.url = url
        self.backend = backend
        self.engine = engine

    def until_idle(self) -> None:
        """Wait until no engine call is in flight; bounded."""
        give_up = time.monotonic() + 10
        while self.engine.active:
            assert time.monotonic() < give_up, "an engine call goes on"
            time.sleep(0.01)


@contextmanager
def serving(
    *layers: int, settings: ServerSettings | None = None, spec: Mapping[str, Any] | None = None, **options: Any
) -> Iterator[Served]:
    """A panel of so many agents a layer (see `panel`) behind HTTP on loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    started = threading.Event()
    made: list[tuple[LocalBackend, Scripted, uvicorn.Server]] = []

    async def serve() -> None:
        runner, engine = panel(*(layers or (3,)), spec=spec, **options)
        backend = LocalBackend(runner)
        app = create_app(backend, settings)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
        made.append((backend, engine, server))
        started.set()
        await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    backend, engine, server = made[0]
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", backend, engine)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()
