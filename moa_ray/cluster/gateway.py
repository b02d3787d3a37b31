"""The HTTP edge's place in the cluster: an ASGI application in a deployment, over handles of the routers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from moa_ray.cluster.translate import error_of_run
from moa_ray.graph import Graph, Message
from moa_ray.runtime import Event, RunOptions

_READY_TIMEOUT_S = 5.0


class RouterBackend:
    """What the server sees of the cluster: graphs by name, runs as streams of events.

    Args:
        routers: Handle of each graph's router.
    """

    def __init__(self, routers: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._routers = dict(routers)
        self._streams = {name: h.options(method_name="stream", stream=True) for name, h in routers.items()}

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
        """Run one request; closing the generator cancels it, down to the engines."""
        response: Any = self._streams[graph].remote(messages, options)
        try:
            async for batch in response:
                yield batch
        except (RayError, RayServeException) as error:
            raise error_of_run(error) from None
        finally:
            response.cancel()

    async def unready(self) -> list[str]:
        """Names of the graphs that cannot answer now."""

        async def answers(name: str) -> bool:
            try:
                return bool(await asyncio.wait_for(self._routers[name].ready.remote(), _READY_TIMEOUT_S))
            except (RayError, RayServeException, TimeoutError):
                return False

        ready = await asyncio.gather(*map(answers, self.graphs))
        return [name for name, is_ready in zip(self.graphs, ready, strict=True) if not is_ready]


class Gateway:
    """The deployment class of the edge.

    Args:
        create_app: Makes the ASGI application from a `RouterBackend` and `settings`.
        settings: What it is set to.
        routers: Handle of each graph's router.
    """

    def __init__(
        self,
        create_app: Callable[[RouterBackend, Any], Any],
        settings: Any,
        routers: dict[str, DeploymentHandle[Any]],
    ) -> None:
        self._settings = settings
        self._app = create_app(RouterBackend(routers), settings)

    def __serve_build_asgi_app__(self) -> Any:  # Serve asks by this name
        return self._app

    async def settings(self) -> Any:
        """What this gateway was deployed with."""
        return self._settings
