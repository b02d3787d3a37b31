"""The HTTP edge's place in the cluster: an ASGI application in a deployment, over handles of the routers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from moa_ray.cluster.calls import Method, Sending, reading
from moa_ray.gates.feedback import Answered, Judgement
from moa_ray.graph import Graph, Message
from moa_ray.runtime import Event, RunOptions

_READY_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 10.0


class RouterBackend:
    """What the server sees of the cluster: graphs by name, runs as streams of events.

    Args:
        routers: Handle of each graph's router.
        feedback: Handle of the one who keeps feedback, where somebody does.
    """

    def __init__(
        self, routers: Mapping[str, DeploymentHandle[Any]], feedback: DeploymentHandle[Any] | None = None
    ) -> None:
        self._routers = dict(routers)
        self._feedback = feedback
        self._streams = {name: Method(handle, "stream", stream=True) for name, handle in routers.items()}

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs."""
        return tuple(self._routers)

    async def graph(self, name: str) -> Graph:
        """The graph `name` as it is now."""
        graph: Graph = await self._routers[name].graph.remote()
        return graph

    async def stream(
        self, graph: str, messages: list[Message], options: RunOptions
    ) -> AsyncGenerator[list[Event], None]:
        """Run one request; closing the generator cancels it, down to the engines. A router may die: see `Sending`."""
        sending = Sending()
        while not sending.done:
            response: Any = self._streams[graph](messages, options)
            with sending.reading(response):
                async for batch in response:
                    sending.passes_on(batch)
                    yield batch

    def remember(self, answered: Answered) -> None:
        """Keep an answer, so that it can be judged; not waited for."""
        if self._feedback is not None:
            self._feedback.remember.remote(answered)

    async def judge(self, judgement: Judgement) -> None:
        """Write down what is said of an answer."""
        assert self._feedback is not None
        response: Any = self._feedback.judge.remote(judgement)
        with reading(response):
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await response

    async def unready(self) -> list[str]:
        """Names of the graphs that cannot answer now."""

        async def answers(name: str) -> bool:
            try:
                return bool(await asyncio.wait_for(self._routers[name].ready.remote(), _READY_TIMEOUT_S))
            except (RayError, RayServeException, TimeoutError):
                return False

        ready = await asyncio.gather(*map(answers, self.graphs))
        return [name for name, is_ready in zip(self.graphs, ready, strict=True) if not is_ready]


@dataclass(frozen=True, slots=True)
class Http:
    """A gateway in front of the routers.

    Args:
        create_app: Makes the ASGI application of a replica; called with a `RouterBackend` and `settings`.
        settings: What it is set to; anything that pickles.
        replicas: How many gateways.
        feedback: The file that judgements of answers go to; None where none are kept.
    """

    create_app: Callable[[Any, Any], Any]
    settings: Any
    replicas: int = 1
    feedback: Path | None = None


class Gateway:
    """The deployment class of the edge.

    Args:
        http: What to serve.
        routers: Handle of each graph's router.
        feedback: Handle of the one who keeps feedback, where somebody does.
    """

    def __init__(
        self, http: Http, routers: dict[str, DeploymentHandle[Any]], feedback: DeploymentHandle[Any] | None = None
    ) -> None:
        self._http = http
        self._app = http.create_app(RouterBackend(routers, feedback), http.settings)

    def __serve_build_asgi_app__(self) -> Any:  # Serve asks by this name
        return _leaving_the_id_to_the_proxy(self._app)

    async def http(self) -> Http:
        """What this gateway was deployed with."""
        return self._http


def _leaving_the_id_to_the_proxy(app: Any) -> Any:
    """`app` without the header that Serve's proxy adds to every answer: the id of the request, which is the same."""

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            await send(message)

        await app(scope, receive, sent)

    return inner
