"""A graph as one Ray Serve application: a `router` deployment, and one deployment per engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle

from moa_ray.cluster.engine_actor import EngineReplica, HandleEngine
from moa_ray.engines import registry
from moa_ray.graph import EngineSpec, Graph, Message, Resources
from moa_ray.graph.spec import Autoscaling
from moa_ray.runtime import Event, Runner, RunOptions

ROUTER = "router"
_ROUTER_REQUESTS = 1000
"""Requests that one router replica holds; they wait on engines, so this is memory, not work."""


def deployment_of(engine: str) -> str:
    """Name of an engine's deployment; the prefix keeps engines from taking the router's name."""
    return f"engine-{engine}"


class Router:
    """The deployment class that runs requests: one replica runs one request from end to end.

    Args:
        graph: The graph.
        engines: Handle of every engine's deployment, by engine name.
    """

    def __init__(self, graph: Graph, engines: dict[str, DeploymentHandle[Any]]) -> None:
        self._runner = Runner(graph, {name: HandleEngine(name, handle) for name, handle in engines.items()})

    async def stream(self, messages: list[Message], options: RunOptions) -> AsyncGenerator[list[Event], None]:
        """Run one request; what happens at the same time travels in one message."""
        async for batch in self._runner.batches(messages, options):
            yield batch


def build(graph: Graph) -> Application:
    """The Serve application of `graph`."""
    engines = {name: _engine(name, spec) for name, spec in graph.engines.items()}
    router = serve.deployment(
        Router, name=ROUTER, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_ROUTER_REQUESTS
    )
    return router.bind(graph, engines)


def _engine(name: str, spec: EngineSpec) -> Application:
    scaling: dict[str, Any] = {"num_replicas": spec.replicas}
    if isinstance(spec.replicas, Autoscaling):
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=spec.replicas.min,
                max_replicas=spec.replicas.max,
                target_ongoing_requests=spec.replicas.target_ongoing_requests,
            )
        }
    return serve.deployment(
        EngineReplica,
        name=deployment_of(name),
        ray_actor_options=actor_options(registry.resources_of(spec)),
        max_ongoing_requests=spec.max_ongoing_requests,
        **scaling,
    ).bind(spec)


def actor_options(resources: Resources) -> dict[str, Any]:
    """`resources` in Ray's words."""
    options: dict[str, Any] = {"num_cpus": resources.num_cpus or 0, "num_gpus": resources.num_gpus or 0}
    if resources.custom:
        options["resources"] = resources.custom
    if resources.accelerator_type:
        options["accelerator_type"] = resources.accelerator_type
    return options
