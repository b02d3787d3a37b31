"""Graphs as one Ray Serve application.

    gateway ──▶ router.<graph> ──▶ engine.<graph>.<engine>
     └─▶ feedback        └───────▶ gate.<graph>

A router per graph and a deployment per engine; one for the gate where that has a model; with HTTP, a gateway in
front, and one that keeps feedback where that is wanted. Every deployment has a version made of what it holds, so
deploying again touches only what changed, and a change of prompts, temperatures or policies reaches running routers
without a restart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from math import isinf
from typing import Any

import ray
from pydantic import BaseModel, SecretStr
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from moa_ray import __version__
from moa_ray.cluster import gate_actor
from moa_ray.cluster.engine_actor import EngineReplica, HandleEngine
from moa_ray.cluster.feedback_actor import FeedbackReplica
from moa_ray.cluster.gate_actor import GateReplica
from moa_ray.cluster.gateway import Gateway, Http
from moa_ray.cluster.ray_metrics import RayMetrics
from moa_ray.cluster.replicas import ReplicaRouter
from moa_ray.engines import registry
from moa_ray.gates import registry as gate_kinds
from moa_ray.graph import EngineSpec, Graph, Message, Resources, from_dict
from moa_ray.graph.spec import Autoscaling
from moa_ray.runtime import (
    AnswerDelta,
    EngineLoad,
    Event,
    GateLoad,
    Health,
    Ledger,
    Meter,
    RunFinished,
    RunMetrics,
    Runner,
    RunOptions,
)

GATEWAY = "gateway"
FEEDBACK = "feedback"
_UNBOUNDED = 100_000
"""Requests that a router or gateway holds; they wait on engines, so this is memory, not work. The gateway admits."""
_SHUTDOWN_POLL_S = 0.5
_REPLICA_ROUTER = f"{ReplicaRouter.__module__}.{ReplicaRouter.__name__}"
_CHANGE_AT_ONCE = {"replicas", "max_ongoing_requests", "price"}
"""Keys of an engine for which no replica is started anew."""
_HEAD = "node:__internal_head__"
"""The resource that Ray gives to the head alone."""
_MODEL_OF_GPU = "accelerator_type:"
"""Prefix of the resource that a node with such accelerators has one of, to ask for with a sliver of it."""


def router_of(graph: str) -> str:
    """Name of a graph's router deployment."""
    return f"router.{graph}"


def gate_of(graph: str) -> str:
    """Name of a graph's gate deployment."""
    return f"gate.{graph}"


def deployment_of(graph: str, engine: str) -> str:
    """Name of an engine's deployment."""
    return f"engine.{graph}.{engine}"


class Router:
    """The deployment class that runs requests: one replica runs one request from end to end.

    Args:
        graph: The graph.
        engines: Handle of every engine's deployment, by engine name.
        gate: Handle of the gate's deployment; None where the gate is the router's own.
    """

    def __init__(
        self, graph: Graph, engines: dict[str, DeploymentHandle[Any]], gate: DeploymentHandle[Any] | None = None
    ) -> None:
        self._engines = {name: HandleEngine(name, handle) for name, handle in engines.items()}
        self._gate = gate
        self._secret = graph.engines
        self._meter = Meter()
        self._metrics = RunMetrics(RayMetrics())
        self._health = Health()
        self._use(graph)

    def reconfigure(self, config: dict[str, Any]) -> None:
        """Take another spec over the same engines; requests that run keep the one they began with."""
        self._use(from_dict(config["spec"]))

    def _use(self, graph: Graph) -> None:
        self._graph = graph
        self._runner = Runner(graph, self._engines, self._health, gate_actor.local(graph, self._gate))

    async def stream(self, messages: list[Message], options: RunOptions) -> AsyncGenerator[list[Event], None]:
        """Run one request; what happens at the same time travels in one message, or all of it, if nobody looks."""
        run = ""
        held: list[Event] = []
        try:
            async with aclosing(self._runner.batches(messages, options, self._book)) as batches:
                async for batch in batches:
                    for event in batch:
                        self._meter.add(event)
                    run, held = batch[0].run, held + batch
                    if _looked_at(batch, options):
                        yield held
                        held = []
        finally:
            self._meter.end(run)

    def _book(self, ledger: Ledger) -> None:
        self._metrics.add(ledger.graph, ledger)

    async def load(self) -> dict[str, EngineLoad]:
        """What this replica sent to each engine of late."""
        return self._meter.load()

    async def gate_load(self) -> GateLoad:
        """How the gate of this replica spread the requests of late."""
        return self._meter.gate()

    async def ready(self) -> bool:
        """Whether every engine answers."""
        for engine in self._engines.values():
            await engine.info()
        return True

    async def graph(self) -> Graph:
        """The graph as it is now, the engines' secrets included."""
        changed = {
            name: self._secret[name].model_copy(update={key: getattr(spec, key) for key in _CHANGE_AT_ONCE})
            for name, spec in self._graph.engines.items()
        }
        return self._graph.with_engines(changed)


def _looked_at(batch: list[Event], options: RunOptions) -> bool:
    """Whether the reader of a run waits for these events."""
    if isinstance(batch[-1], RunFinished):
        return True
    return not isinf(options.answer_flush_s) and (
        not options.answer_only or any(isinstance(event, AnswerDelta) for event in batch)
    )


def build(graphs: Sequence[Graph], http: Http | None = None) -> Application:
    """The Serve application of `graphs`; with `http`, its root is the gateway, else the first graph's router."""
    routers = {graph.spec.name: _router(graph) for graph in graphs}
    if http is None:
        return next(iter(routers.values()))
    gateway = _deployment(
        serve.ingress()(Gateway),
        GATEWAY,
        version=_hash(sorted(routers), http.settings),
        num_replicas=http.replicas,
        max_ongoing_requests=_UNBOUNDED,
        **_patience(graphs),
    )
    return gateway.bind(http, routers, _feedback(http))


def _feedback(http: Http) -> Application | None:
    if http.feedback is None:
        return None
    deployment = _deployment(
        FeedbackReplica,
        FEEDBACK,
        version=_hash(http.feedback),
        max_ongoing_requests=_UNBOUNDED,
    )
    return deployment.bind(http.feedback)


def _router(graph: Graph) -> Application:
    engines = {name: _engine(graph, name, spec) for name, spec in graph.engines.items()}
    gate = _gate(graph)
    router = _deployment(
        Router,
        router_of(graph.spec.name),
        version=_hash([_content(spec) for _, spec in sorted(graph.engines.items())], sorted(engines), gate is None),
        user_config={"spec": graph.spec.model_dump(mode="json")},
        max_ongoing_requests=_UNBOUNDED,
        **_patience([graph]),
    )
    return router.bind(graph, engines, gate)


def _gate(graph: Graph) -> Application | None:
    if not gate_kinds.has_model(graph):
        return None
    spec = graph.spec
    deployment = _deployment(
        GateReplica,
        gate_of(spec.name),
        version=_hash(spec.gate, list(spec.agents), spec.layers),
        max_ongoing_requests=_UNBOUNDED,
    )
    return deployment.bind(graph)


def _engine(graph: Graph, name: str, spec: EngineSpec) -> Application:
    scaling: dict[str, Any] = {"num_replicas": spec.replicas}
    if isinstance(spec.replicas, Autoscaling):
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=spec.replicas.min,
                max_replicas=spec.replicas.max,
                target_ongoing_requests=spec.replicas.target_ongoing_requests,
                upscale_delay_s=spec.replicas.upscale_delay_s,
                downscale_delay_s=spec.replicas.downscale_delay_s,
            )
        }
    deployment = _deployment(
        EngineReplica,
        deployment_of(graph.spec.name, name),
        version=_hash(_content(spec)),
        **_placed(spec),
        max_ongoing_requests=spec.max_ongoing_requests,
        request_router_config=RequestRouterConfig(request_router_class=_REPLICA_ROUTER),
        **scaling,
        **_patience([graph]),
    )
    return deployment.bind(spec)


def _deployment(cls: type, name: str, *, version: str, **options: Any) -> serve.Deployment:
    """A deployment; one of which it is not said what it takes, takes nothing, and is kept off the head."""
    if "ray_actor_options" not in options:
        options["ray_actor_options"] = _off_the_head()
    # Serve would give each deploy a random version, and so restart everything at each.
    return serve.deployment(cls, name=name, **options).options(version=version, _internal=True)


def _placed(spec: EngineSpec) -> dict[str, Any]:
    placed = placement(spec)
    return placed if "placement_group_bundles" in placed or demand_of(placed["ray_actor_options"]) else {}


def _off_the_head() -> dict[str, Any]:
    """Options of an actor that takes nothing: it is on another node than the head, where there is one.

    While a head whose state is kept elsewhere restarts, what is on the other nodes goes on. A machine that takes the
    head's place has another id: until the next deployment, which replaces these actors one by one, they may be on it.
    """
    head = next((node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]), "")
    return {
        "num_cpus": 0,
        "label_selector": {"ray.io/node-id": f"!{head}"},
        "fallback_strategy": [{"label_selector": {"ray.io/node-id": head}}],
    }


def _patience(graphs: Sequence[Graph]) -> dict[str, float]:
    """A replica that is taken away finishes what it has begun."""
    longest = max(graph.spec.limits.deadline_s or graph.spec.policy.deadline_s for graph in graphs)
    return {"graceful_shutdown_timeout_s": longest, "graceful_shutdown_wait_loop_s": _SHUTDOWN_POLL_S}


def _content(spec: EngineSpec) -> dict[str, Any]:
    """What makes an engine's replica what it is."""
    return spec.model_dump(exclude=_CHANGE_AT_ONCE)


def _hash(*content: Any) -> str:
    text = json.dumps([__version__, *content], sort_keys=True, default=_revealed)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _revealed(value: Any) -> Any:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case BaseModel():
            return value.model_dump()
        case _:
            return repr(value)


def placement(spec: EngineSpec) -> dict[str, Any]:
    """What a replica of `spec` takes, as options of a deployment.

    An engine whose replica is several workers gets a placement group, a bundle a worker; the replica itself sits in
    the first and takes nothing.
    """
    options = actor_options(registry.resources_of(spec))
    workers = registry.workers_of(spec)
    if not workers:
        return {"ray_actor_options": options}
    bundle = {key: amount / workers for key, amount in demand_of(options).items() if not key.startswith(_MODEL_OF_GPU)}
    bundle |= {key: amount for key, amount in demand_of(options).items() if key.startswith(_MODEL_OF_GPU)}
    return {
        "ray_actor_options": {"num_cpus": 0, "num_gpus": 0},
        "placement_group_bundles": [bundle] * workers,
        "placement_group_strategy": "PACK",
    }


def demand_of(options: Mapping[str, Any]) -> dict[str, float]:
    """An actor's options as amounts of Ray's resources; none that is zero."""
    demand = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options.get("resources", {})}
    if "accelerator_type" in options:
        demand[f"{_MODEL_OF_GPU}{options['accelerator_type']}"] = 0.001
    return {key: amount for key, amount in demand.items() if amount}


def actor_options(resources: Resources) -> dict[str, Any]:
    """`resources` in Ray's words."""
    options: dict[str, Any] = {"num_cpus": resources.num_cpus or 0, "num_gpus": resources.num_gpus or 0}
    if resources.custom:
        options["resources"] = resources.custom
    if resources.accelerator_type:
        options["accelerator_type"] = resources.accelerator_type
    return options
