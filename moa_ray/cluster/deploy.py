"""Bring an application up, and say within a bounded time why it does not come up."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.autoscaler.v2.schema import ClusterStatus
from ray.serve.schema import ApplicationStatus

from moa_ray.cluster.app import build, demand_of, deployment_of, placement
from moa_ray.cluster.gateway import Http
from moa_ray.cluster.session import cluster_status, details_of
from moa_ray.errors import ClusterError, ResourcesShort
from moa_ray.graph import EngineSpec, Graph

PLACE_TIMEOUT_S = 20.0
"""How long a replica may wait for a node with room for it, while Ray's autoscaler brings none."""
START_TIMEOUT_S = 600.0
"""How long all replicas together may take to load their models."""
NODE_TIMEOUT_S = 1800.0
"""How long nodes may take that Ray's autoscaler brings, before that."""
_ABANDON_TIMEOUT_S = 10.0
_POLL_S = 0.1

Progress = Callable[[dict[str, tuple[int, int]]], None]
"""Told what is up: engine name -> (replicas ready, replicas wanted)."""


def deploy(
    graphs: Sequence[Graph],
    app: str,
    *,
    http: Http | None = None,
    route_prefix: str | None = None,
    may_grow: bool = False,
    progress: Progress | None = None,
) -> None:
    """Deploy `graphs` as the Serve application `app`, or update it, and wait until every engine is ready.

    Args:
        graphs: The graphs.
        app: Name of the application.
        http: A gateway in front; None for none.
        route_prefix: Where the gateway answers; None for nowhere.
        may_grow: Whether the cluster may get nodes that it does not have yet.
        progress: Called whenever the number of ready replicas changes.

    Raises:
        ResourcesShort: If a replica finds no place within `PLACE_TIMEOUT_S`, and no node is on its way.
        ClusterError: If an engine cannot start. Nothing of a new application is left behind; of one that was
            there, what ran before still runs.
    """
    if not may_grow:
        _check_feasible(graphs)
    was_there = app in serve.status().applications
    target = serve.RunTarget(build(graphs, http), name=app, route_prefix=route_prefix)
    try:
        serve.run_many([target], wait_for_applications_running=False)
        _wait(graphs, app, progress)
    except BaseException:
        if not was_there:
            _abandon(app)
        raise


def _abandon(app: str) -> None:
    """Delete an application that did not come up, without the patience that running requests deserve."""
    serve.delete(app, _blocking=False)
    give_up = time.monotonic() + _ABANDON_TIMEOUT_S
    # Serve would wait as long for a replica that never found a place as for one that is answering.
    while app in serve.status().applications and time.monotonic() < give_up:
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["name"].startswith(f"SERVE_REPLICA::{app}#"):
                with suppress(ValueError):  # it is gone already
                    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
        time.sleep(_POLL_S)


def _engines(graphs: Sequence[Graph]) -> Iterator[tuple[Graph, str, EngineSpec, str]]:
    """Every engine: its graph, name, spec and deployment."""
    for graph in graphs:
        for name, spec in graph.engines.items():
            yield graph, name, spec, deployment_of(graph.spec.name, name)


def _wait(graphs: Sequence[Graph], app: str, progress: Progress | None) -> None:
    began = started = had_room = time.monotonic()
    told: dict[str, tuple[int, int]] = {}
    while True:
        status = serve.status().applications.get(app)
        now = time.monotonic()
        if status is not None:
            ready = {
                name: (running.replica_states.get("RUNNING", 0), sum(running.replica_states.values()))
                for _, name, _, deployment in _engines(graphs)
                if (running := status.deployments.get(deployment)) is not None
            }
            if progress and ready != told:
                progress(ready)
                told = ready
            if status.status == ApplicationStatus.RUNNING:
                return
            if status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise _failure(graphs, status)
        cluster = cluster_status()
        unplaced = _unplaced(graphs, app, cluster)
        coming = bool(cluster.pending_launches or cluster.pending_nodes) and now - began < NODE_TIMEOUT_S
        if coming:
            started = had_room = now
        elif unplaced is None:
            had_room = now
        elif now - had_room > PLACE_TIMEOUT_S:
            raise _short(*unplaced)
        if now - started > START_TIMEOUT_S:
            raise ClusterError(f"the engines of {app} did not come up within {START_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)


def _check_feasible(graphs: Sequence[Graph]) -> None:
    """An engine that no set of nodes could ever hold need not be waited for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for graph, name, spec, _ in _engines(graphs):
        if not _fits(_bundles(spec), nodes):
            raise _short(graph, name, spec)


def _unplaced(graphs: Sequence[Graph], app: str, cluster: ClusterStatus) -> tuple[Graph, str, EngineSpec] | None:
    """An engine with a replica that waits for room.

    Ray says who waits. What is free does not: a replica whose process still starts holds its room already, and on a
    busy machine it starts for long.
    """
    deployments = details_of(app).get("deployments") or {}
    groups = {group["name"] for group in ray.util.placement_group_table().values() if group["state"] == "PENDING"}
    demands = cluster.resource_demands.ray_task_actor_demand
    waiting = [request.bundle for demand in demands for request in demand.bundles_by_count]
    for graph, name, spec, deployment in _engines(graphs):
        starting = [
            replica["actor_name"]
            for replica in deployments.get(deployment, {}).get("replicas", [])
            if replica["state"] == "STARTING" and not replica.get("node_id")
        ]
        wanted = demand_of(placement(spec)["ray_actor_options"])  # nothing, where a placement group has it all
        if (starting and wanted and wanted in waiting) or not groups.isdisjoint(starting):
            return graph, name, spec
    return None


def _fits(bundles: Iterable[Mapping[str, float]], nodes: Iterable[Mapping[str, float]]) -> bool:
    """Whether the nodes, each given by its resources, hold all bundles, each bundle on one node."""
    left = [dict(node) for node in nodes]
    for bundle in bundles:
        home = next((node for node in left if all(node.get(key, 0) >= bundle[key] for key in bundle)), None)
        if home is None:
            return False
        for key, amount in bundle.items():
            home[key] -= amount
    return True


def _short(graph: Graph, engine: str, spec: EngineSpec) -> ResourcesShort:
    """Which resource is short for a replica of `engine`, in words."""
    total, free = ray.cluster_resources(), ray.available_resources()
    bundles = _bundles(spec)
    demand = {key: sum(bundle[key] for bundle in bundles) for key in bundles[0]}
    # The scarcest one: least free for what is wanted.
    key = min(demand, key=lambda name: free.get(name, 0) - demand[name])
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = _fits([{key: bundle[key]} for bundle in bundles], nodes)
    where = "" if fits or total.get(key, 0) < demand[key] else ", no single node has that many"
    return ResourcesShort(
        f"engine {engine!r} needs {demand[key]:g} {key} for each replica; "
        f"the cluster has {total.get(key, 0):g}, {max(free.get(key, 0), 0):g} of them free{where}",
        hint=f"lower engines' resources or replicas in {graph.source.file or 'the spec'}, or add nodes to the cluster",
    )


def _bundles(spec: EngineSpec) -> list[dict[str, float]]:
    """What a replica takes, each bundle from one node; at least one."""
    placed = placement(spec)
    bundles: list[dict[str, float]] = placed.get("placement_group_bundles") or [demand_of(placed["ray_actor_options"])]
    return bundles


def _failure(graphs: Sequence[Graph], status: Any) -> ClusterError:
    """Why the application did not start, out of the traceback of the actor that failed."""
    for _, name, _, deployment in _engines(graphs):
        details = status.deployments.get(deployment)
        if details is not None and details.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reason, hint = _last_words(details.message)
            return ClusterError(f"engine {name!r} did not start: {reason}", hint=hint)
    return ClusterError(f"the application did not start: {status.message.strip()}")


def _last_words(traceback: str) -> tuple[str, str]:
    """The message and the hint of the error that a traceback ends with."""
    lines = [line.strip() for line in traceback.splitlines() if line.strip()]
    hint = lines.pop().removeprefix("hint: ") if lines and lines[-1].startswith("hint: ") else ""
    return re.sub(r"^moa_ray\.errors\.\w+: ", "", lines[-1]) if lines else "no reason given", hint
