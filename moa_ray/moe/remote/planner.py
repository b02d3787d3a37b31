"""Which experts to replicate, and where, so that workers are equally busy.

The three greedy steps of DeepSeek's expert-parallelism load balancer (EPLB): groups of experts to nodes, more
copies of the hottest experts within a node, copies to devices. With one node and one group it is global.
"""

from __future__ import annotations

from collections.abc import Sequence

from moa_ray.moe.errors import PoolError
from moa_ray.moe.remote.placement import Placement


def plan(load_E: Sequence[float], workers: Sequence[str], slots: int, *, groups: int = 1, nodes: int = 1) -> Placement:
    """A placement in which each worker has `slots` experts, hot ones on several workers.

    Args:
        load_E: Load of each expert, in tokens or seconds.
        workers: Names; consecutive ones share a node.
        slots: Experts of each worker.
        groups: Groups of consecutive experts that a gate chooses together and that stay on one node.
        nodes: Nodes, each with the same number of workers.

    Raises:
        PoolError: Fewer slots than experts, or numbers that do not divide each other.
    """
    physical = rebalance(load_E, slots * len(workers), groups, nodes, len(workers))
    return {
        worker: tuple(sorted(set(physical[place * slots : (place + 1) * slots])))
        for place, worker in enumerate(workers)
    }


def rebalance(load_E: Sequence[float], replicas: int, groups: int, nodes: int, devices: int) -> list[int]:
    """EPLB: the expert in each of `replicas` slots, device by device.

    Args:
        load_E: Load of each expert.
        replicas: Slots of all devices together.
        groups: Groups of experts; divides their number.
        nodes: Divides the groups.
        devices: Divided by the nodes; divides the replicas.

    Raises:
        PoolError: Fewer slots than experts, or numbers that do not divide each other.
    """
    experts = len(load_E)
    if groups % nodes:  # groups cannot stay together
        groups = nodes = 1
    if replicas < experts:
        raise PoolError(f"{replicas} slots do not hold {experts} experts", hint="more slots per worker")
    for whole, part in ((experts, groups), (devices, nodes), (replicas, devices)):
        if whole % part:
            raise PoolError(f"{whole} is not divisible by {part}")
    size = experts // groups
    group_load = [sum(load_E[g * size : (g + 1) * size]) for g in range(groups)]
    slots: list[int] = []
    for node in _pack(group_load, nodes):
        mine = [group * size + expert for group in node for expert in range(size)]
        copies = _replicate([load_E[expert] for expert in mine], replicas // nodes)
        share = [load_E[mine[c]] / copies.count(c) for c in copies]
        for device in _pack(share, devices // nodes):
            slots += [mine[copies[slot]] for slot in device]
    return slots


def _pack(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Items into packs of equal number, the heaviest first, each into the lightest pack that has room."""
    size = len(weights) // packs
    found: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        pack = min((p for p in range(packs) if len(found[p]) < size), key=lambda p: total[p])
        found[pack].append(item)
        total[pack] += weights[item]
    return found


def _replicate(load: Sequence[float], slots: int) -> list[int]:
    """Each item once, then again and again the one whose copies are the busiest."""
    copies = list(range(len(load)))
    count = [1] * len(load)
    while len(copies) < slots:
        hot = max(range(len(load)), key=lambda item: load[item] / count[item])
        count[hot] += 1
        copies.append(hot)
    return copies
