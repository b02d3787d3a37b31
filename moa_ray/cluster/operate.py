"""What operators do with applications that are up: look at them, scale an engine, take them down."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from moa_ray.cluster.app import GATEWAY, deployment_of, router_of
from moa_ray.cluster.deploy import deploy
from moa_ray.cluster.gateway import Http
from moa_ray.cluster.session import details_of, serve_details
from moa_ray.engines import registry
from moa_ray.errors import ClusterError, MoARayError, RequestError
from moa_ray.graph import EngineSpec, Graph
from moa_ray.graph.source import did_you_mean, which
from moa_ray.graph.spec import Autoscaling
from moa_ray.runtime import EngineLoad, GateLoad

_ANSWER_TIMEOUT_S = 10.0
_ROUTER = router_of("")

_BUSY = 0.8
"""Share of what a replica holds at once that it is meant to hold, where nobody says how much."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One engine of a running application.

    Args:
        graph: Name of its graph.
        engine: Its own name.
        kind: Its kind.
        model: Its model.
        wanted: Replicas that Serve aims at.
        alive: Replicas that answer.
        gpus: GPUs that these hold.
        load: What the routers sent to it in the last minute.
        queued: Calls in flight beyond what the living replicas hold at once.
        hint: Replicas that its load of the last minute asks for.
    """

    graph: str
    engine: str
    kind: str
    model: str
    wanted: int
    alive: int
    gpus: float
    load: EngineLoad
    queued: int
    hint: int


@dataclass(frozen=True, slots=True)
class GateStatus:
    """The gate of one graph of a running application.

    Args:
        graph: Name of the graph.
        kind: Its kind.
        load: What it did in the last minute, with every proposer in it.
    """

    graph: str
    kind: str
    load: GateLoad


@dataclass(frozen=True, slots=True)
class AppStatus:
    """A running application.

    Args:
        app: Its name.
        state: Serve's word for how it is.
        route_prefix: Where it answers; None for nowhere.
        engines: Its engines.
        message: What Serve says of it, "" for nothing.
        gates: Gates of those of its graphs that have one.
    """

    app: str
    state: str
    route_prefix: str | None
    engines: tuple[EngineStatus, ...]
    message: str = ""
    gates: tuple[GateStatus, ...] = ()


def status(app: str | None = None) -> list[AppStatus]:
    """All applications of moa-ray, or `app` alone.

    Raises:
        RequestError: If there is no such application.
    """
    if app:
        return [_status(app, _details(app))]
    return [_status(name, details) for name, details in serve_details()["applications"].items() if _graphs(details)]


def _status(app: str, details: Mapping[str, Any]) -> AppStatus:
    engines: list[EngineStatus] = []
    gates: list[GateStatus] = []
    message = details["message"]
    try:
        for name in _graphs(details):
            graph: Graph = _ask(app, router_of(name), "graph")
            engines += _engines(app, graph, details["deployments"])
            gates += _gate(app, graph)
    except MoARayError as error:  # a router that does not answer now; the rest is worth telling
        message = error.message
    return AppStatus(app, details["status"].value, details["route_prefix"], tuple(engines), message, tuple(gates))


def _engines(app: str, graph: Graph, deployments: Mapping[str, Any]) -> list[EngineStatus]:
    name = graph.spec.name
    loads: list[dict[str, EngineLoad]] = _ask_all(app, router_of(name), "load")
    found = []
    for engine, spec in graph.engines.items():
        deployment = deployments[deployment_of(name, engine)]
        alive = sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])
        load = reduce(add, (each[engine] for each in loads if engine in each), EngineLoad())
        queued = max(0, load.ongoing - alive * spec.max_ongoing_requests)
        gpus = alive * (registry.resources_of(spec).num_gpus or 0)
        wanted = deployment["target_num_replicas"]
        hint = _replicas_for(load, spec)
        found.append(EngineStatus(name, engine, spec.kind, spec.model, wanted, alive, gpus, load, queued, hint))
    return found


def _replicas_for(load: EngineLoad, spec: EngineSpec) -> int:
    """Replicas that what the gate and the graph send to an engine would keep as busy as they are meant to be."""
    scaling = spec.replicas
    each = scaling.target_ongoing_requests if isinstance(scaling, Autoscaling) else _BUSY * spec.max_ongoing_requests
    return max(1, math.ceil(load.mean_ongoing / each))


def _gate(app: str, graph: Graph) -> list[GateStatus]:
    if graph.spec.gate.kind == "all":
        return []
    loads: list[GateLoad] = _ask_all(app, router_of(graph.spec.name), "gate_load")
    load = reduce(add, loads, GateLoad()).among(call.agent for call in graph.calls)
    return [GateStatus(graph.spec.name, graph.spec.gate.kind, load)]


def scale(app: str, replicas: Mapping[str, int | Autoscaling]) -> None:
    """Give engines of a running application another number of replicas; nothing else moves.

    Returns when the new replicas answer; a replica that goes first finishes what it has begun.

    Args:
        app: Name of the application.
        replicas: By engine, or `graph/engine` where several graphs have one of that name.

    Raises:
        RequestError: If there is no such application or engine.
        ResourcesShort: If a new replica finds no place; the old number is then wanted again.
    """
    details = _details(app)
    graphs: dict[str, Graph] = {name: _ask(app, router_of(name), "graph") for name in _graphs(details)}
    http: Http | None = _ask(app, GATEWAY, "http") if GATEWAY in details["deployments"] else None
    changed = dict(graphs)
    for wanted, count in replicas.items():
        name, engine = _find(app, changed, wanted)
        spec = changed[name].engines[engine].model_copy(update={"replicas": count})
        changed[name] = changed[name].with_engines({engine: spec})

    def put(which: Mapping[str, Graph]) -> None:
        deploy(list(which.values()), app, http=http, route_prefix=details["route_prefix"], may_grow=True)

    try:
        put(changed)
    except ClusterError:
        put(graphs)
        raise


def _find(app: str, graphs: Mapping[str, Graph], wanted: str) -> tuple[str, str]:
    """The graph and the engine that `wanted` names."""
    known = {f"{name}/{engine}": (name, engine) for name, graph in graphs.items() for engine in graph.engines}
    found = [pair for full, pair in known.items() if wanted in (full, pair[1])]
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(f"several graphs of {app} have an engine {wanted!r}", hint="write GRAPH/ENGINE=N")
    names = [engine for _, engine in known.values()]
    hint = did_you_mean(wanted, [*known, *names]) or f"there are: {', '.join(known)}"
    raise RequestError(f"{app} has no engine {wanted!r}", hint=hint)


def delete(app: str) -> None:
    """Take an application down; what it is answering is finished first.

    Raises:
        RequestError: If there is no such application.
    """
    _details(app)
    serve.delete(app)


def _details(app: str) -> dict[str, Any]:
    if details := details_of(app):
        if _graphs(details):
            return details
        raise RequestError(f"the application {app!r} is not one of moa-ray's, or is being taken down")
    known = [name for name, details in serve_details()["applications"].items() if _graphs(details)]
    hint = which(app, known)
    raise RequestError(f"there is no application {app!r}", hint=hint)


def _graphs(details: Mapping[str, Any]) -> list[str]:
    """Names of an application's graphs."""
    return [name.removeprefix(_ROUTER) for name in details.get("deployments") or {} if name.startswith(_ROUTER)]


def _ask(app: str, deployment: str, method: str) -> Any:
    """What one replica answers."""
    with _answering(app, deployment) as handle:
        return getattr(handle, method).remote().result(timeout_s=_ANSWER_TIMEOUT_S)


def _ask_all(app: str, deployment: str, method: str) -> Any:
    """What each replica answers."""
    with _answering(app, deployment) as handle:
        return handle.broadcast(method).results(timeout_s=_ANSWER_TIMEOUT_S)


@contextmanager
def _answering(app: str, deployment: str) -> Generator[Any, None, None]:
    try:
        yield serve.get_deployment_handle(deployment, app)
    except (RayError, RayServeException, TimeoutError) as error:
        raise ClusterError(f"{deployment} of {app} does not answer: {type(error).__name__}") from error
