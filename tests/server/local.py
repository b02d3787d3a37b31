"""The HTTP edge over graphs in this process: a real server, scripted engines, no Ray."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import httpx2

from moa_ray.engines import Scripted
from moa_ray.gates.feedback import Answered, Feedback, Judgement
from moa_ray.graph import Graph, Message
from moa_ray.runtime import Event, Runner, RunOptions
from moa_ray.server import ServerSettings, create_app
from moa_ray.server.edge import Admission
from moa_ray.server.metrics import Metrics
from moa_ray.server.runs import Choice
from tests.conftest import until
from tests.http import answering
from tests.runtime.panels import panel


class LocalBackend:
    """A `Backend` over runners."""

    def __init__(self, *runners: Runner) -> None:
        self.runners = {runner.graph.spec.name: runner for runner in runners}
        self.down: list[str] = []
        self.feedback: Feedback | None = None

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

    def remember(self, answered: Answered) -> None:
        assert self.feedback is not None
        self.feedback.remember(answered)

    async def judge(self, judgement: Judgement) -> None:
        assert self.feedback is not None
        self.feedback.judge(judgement)

    async def unready(self) -> list[str]:
        return self.down


class Served:
    """A running server: its base URL, backend and the scripted engine of its panel."""

    def __init__(self, url: str, backend: LocalBackend, engine: Scripted) -> None:
        self.url = url
        self.backend = backend
        self.engine = engine

    def ask(self, *, headers: Mapping[str, str] | None = None, **body: Any) -> httpx2.Response:
        """Have the panel answer `why?`; `body` has further fields, or others."""
        question = {"model": "panel", "messages": [{"role": "user", "content": "why?"}], **body}
        return httpx2.post(f"{self.url}/v1/chat/completions", json=question, headers=headers, timeout=30)

    def until_idle(self) -> None:
        """Wait until no engine call is in flight; bounded."""
        until(lambda: not self.engine.active, within_s=10)


@contextmanager
def serving(
    *layers: int, settings: ServerSettings | None = None, spec: Mapping[str, Any] | None = None, **options: Any
) -> Iterator[Served]:
    """A panel of so many agents a layer (see `panel`) behind HTTP on loopback."""
    runner, engine = panel(*(layers or (3,)), spec=spec, **options)
    backend = LocalBackend(runner)
    if settings and settings.feedback:
        backend.feedback = Feedback(settings.feedback)
    with answering(create_app(backend, settings)) as url:
        yield Served(url, backend, engine)


def metric_kinds(settings: ServerSettings) -> dict[str, str]:
    """The type of every metric that a gateway tells after one request, by its name."""
    recorder = settings.recorder()
    metrics = Metrics(Admission(settings), recorder)
    metrics.add("m", 200, [Choice()])
    if recorder:
        recorder.close()
    return dict(re.findall(r"^# TYPE (\S+) (\S+)", metrics.text().decode(), re.MULTILINE))
