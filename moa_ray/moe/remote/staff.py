"""The actors of a pool as one staff: started together or not at all, asked together, ended together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moa_ray.errors import ClusterError, ResourcesShort
from moa_ray.moe.remote.actors import CONTROL_S, ShardActor
from moa_ray.moe.remote.peers import Patience
from moa_ray.moe.remote.shard import ShardSpec


@dataclass(frozen=True, slots=True)
class Staff:
    """What every copy of a pool knows; the keeper by its name, since a restarted actor must find it, too."""

    keeper_name: str
    spec: ShardSpec
    secret: str
    patience: Patience
    bundle: dict[str, float]

    @property
    def keeper(self) -> Any:
        """Its handle."""
        return ray.get_actor(self.keeper_name)


def ask_all(refs: Any) -> list[Any]:
    """Results of calls of the control plane.

    Raises:
        ClusterError: An actor is gone, or did not answer in time.
    """
    try:
        found: list[Any] = ray.get(list(refs), timeout=CONTROL_S)
    except GetTimeoutError as error:
        raise ClusterError(f"workers did not answer within {CONTROL_S:g} s") from error
    except RayActorError as error:
        raise ClusterError(f"a worker died: {error}") from error
    return found


def start(staff: Staff, names: list[str], timeout_s: float) -> tuple[dict[str, Any], PlacementGroup]:
    """Actors for some workers, on nodes as different as there are, or nothing at all.

    Raises:
        ResourcesShort: One has nowhere to run.
        ClusterError: One did not start.
    """
    group = placement_group([staff.bundle or {"CPU": 0.001} for _ in names], strategy="SPREAD")
    actors: dict[str, Any] = {}
    try:
        if not group.wait(timeout_s):
            raise _no_room(staff.bundle, names)
        for index, name in enumerate(names):
            make = ray.remote(ShardActor).options(
                num_cpus=staff.bundle.get("CPU", 0),
                num_gpus=staff.bundle.get("GPU", 0),
                max_restarts=-1,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            )
            actors[name] = make.remote(name, staff.spec, staff.secret, staff.keeper_name)
        ask_all([staff.keeper.hire.remote(actors)])
        ask_all(actor.facts.remote() for actor in actors.values())
    except BaseException:
        stop(actors.values(), [group])
        raise
    return actors, group


def _no_room(bundle: Mapping[str, float], names: Sequence[str]) -> ResourcesShort:
    """Says which worker is the first that does not fit beside those before it."""
    free = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    in_use = {k: ray.cluster_resources().get(k, 0) - ray.available_resources().get(k, 0) for k in bundle}
    wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
    place = len(names) - 1
    for index in range(len(names)):
        node = next((node for node in free if all(node.get(k, 0) >= v for k, v in bundle.items())), None)
        if node is None:
            place = index
            break
        for kind, amount in bundle.items():
            node[kind] -= amount
    have = ", ".join(f"{ray.cluster_resources().get(k, 0):g} {k} of which {in_use[k]:g} in use" for k in bundle)
    return ResourcesShort(
        f"bundle {place} of {len(names)} ({names[place]}: {wanted}) cannot be placed: the cluster has {have}",
        hint="fewer shards or replicas, a fraction of a GPU each, or more nodes",
    )


def stop(actors: Iterable[Any], groups: Iterable[PlacementGroup]) -> None:
    """Ends actors, then gives back their room."""
    for actor in actors:
        ray.kill(actor)
    for group in groups:
        remove_placement_group(group)
