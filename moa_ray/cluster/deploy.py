"""Bring a graph's application up, and say within a bounded time why it does not come up."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from moa_ray.cluster.app import actor_options, build, deployment_of
from moa_ray.engines import registry
from moa_ray.errors import ClusterError, ResourcesShort
from moa_ray.graph import Graph

PLACE_TIMEOUT_S = 15.0
"""How long a replica may wait for a free place in the cluster."""
START_TIMEOUT_S = 600.0
"""How long all replicas together may take to load their models."""
_POLL_S = 0.1

Progress = Callable[[dict[str, tuple[int, int]]], None]
"""Told what is up: engine name -> (replicas ready, replicas wanted)."""


def deploy(
    graph: Graph, app: str, *, may_grow: bool = False, progress: Progress | None = None
) -> serve.handle.DeploymentHandle[Any]:
    """Deploy `graph` as the Serve application `app` and wait until every engine is ready.

    Args:
        graph: The graph.
        app: Name of the application.
        may_grow: Whether the cluster may get nodes that it does not have yet.
        progress: Called whenever the number of ready replicas changes.

    Returns:
        The handle of the router.

    Raises:
        ResourcesShort: If a replica finds no place within `PLACE_TIMEOUT_S`.
        ClusterError: If an engine cannot start. Nothing of the application is left behind.
    """
    if not may_grow:
        _check_feasible(graph)
    target = serve.RunTarget(build(graph), name=app, route_prefix=None)
    try:
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        _wait(graph, app, progress)
    except BaseException:
        serve.delete(app, _blocking=False)
        raise
    return handle


def _wait(graph: Graph, app: str, progress: Progress | None) -> None:
    started = time.monotonic()
    told: dict[str, tuple[int, int]] = {}
    while True:
        status = serve.status().applications.get(app)
        waited_s = time.monotonic() - started
        if status is not None:
            ready = {
                name: (running.replica_states.get("RUNNING", 0), sum(running.replica_states.values()))
                for name in graph.engines
                if (running := status.deployments.get(deployment_of(name))) is not None
            }
            if progress and ready != told:
                progress(ready)
                told = ready
            if status.status == ApplicationStatus.RUNNING:
                return
            if status.status == ApplicationStatus.DEPLOY_FAILED:
                raise _failure(graph, status)
        if waited_s > PLACE_TIMEOUT_S and (unplaced := _unplaced(graph, app)):
            raise _short(graph, unplaced[0])
        if waited_s > START_TIMEOUT_S:
            raise ClusterError(f"the engines of {app} did not come up within {START_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)


def _check_feasible(graph: Graph) -> None:
    """An engine that no node could ever hold need not be waited for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name in graph.engines:
        demand = _demand(graph, name)
        if not any(all(node.get(key, 0) >= amount for key, amount in demand.items()) for node in nodes):
            raise _short(graph, name)


def _unplaced(graph: Graph, app: str) -> list[str]:
    """Engines with a replica that Ray has not found a node for."""
    # Serve's public status does not tell a replica that waits for a node from one that loads its model.
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()["applications"].get(app, {}).get("deployments", {})
    return [
        name
        for name in graph.engines
        if _demand(graph, name)
        for replica in details.get(deployment_of(name), {}).get("replicas", [])
        if replica["state"] == "STARTING" and not replica.get("node_id")
    ]


def _short(graph: Graph, engine: str) -> ResourcesShort:
    """Which resource is short for a replica of `engine`, in words."""
    total, free = ray.cluster_resources(), ray.available_resources()
    demand = _demand(graph, engine)
    # The scarcest one: least free for what is wanted.
    key = min(demand, key=lambda name: free.get(name, 0) - demand[name])
    fits = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(key, 0) >= demand[key]]
    where = "" if fits or total.get(key, 0) < demand[key] else ", no single node has that many"
    return ResourcesShort(
        f"engine {engine!r} needs {demand[key]:g} {key} for each replica; "
        f"the cluster has {total.get(key, 0):g}, {max(free.get(key, 0), 0):g} of them free{where}",
        hint=f"lower engines' resources or replicas in {graph.source.file or 'the spec'}, or add nodes to the cluster",
    )


def _demand(graph: Graph, engine: str) -> dict[str, float]:
    options = actor_options(registry.resources_of(graph.engines[engine]))
    demand = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options.get("resources", {})}
    if "accelerator_type" in options:
        demand[f"accelerator_type:{options['accelerator_type']}"] = 0.001
    return {key: amount for key, amount in demand.items() if amount}


def _failure(graph: Graph, status: Any) -> ClusterError:
    """Why the application did not start, out of the traceback of the actor that failed."""
    for name in graph.engines:
        deployment = status.deployments.get(deployment_of(name))
        if deployment is not None and deployment.status == "DEPLOY_FAILED":
            reason, hint = _last_words(deployment.message)
            return ClusterError(f"engine {name!r} did not start: {reason}", hint=hint)
    return ClusterError(f"the application did not start: {status.message.strip()}")


def _last_words(traceback: str) -> tuple[str, str]:
    """The message and the hint of the error that a traceback ends with."""
    lines = [line.strip() for line in traceback.splitlines() if line.strip()]
    hint = lines.pop().removeprefix("hint: ") if lines and lines[-1].startswith("hint: ") else ""
    return re.sub(r"^moa_ray\.errors\.\w+: ", "", lines[-1]) if lines else "no reason given", hint
