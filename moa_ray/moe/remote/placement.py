"""Which worker holds which experts, and which of its holders an expert's rows go to.

A shard with r replicas is r workers that hold the same experts; a hot expert that the planner
replicated is one that more workers hold. There is no other notion of either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from moa_ray.moe.errors import PoolError
from moa_ray.moe.remote.transport import Address

_MESSAGE_ROWS = 64
"""What a message costs, in rows of work: a holder that has fewer takes more before another one is asked."""

Placement = dict[str, tuple[int, ...]]
"""Experts of each worker, ascending, by the worker's name."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as callers see it.

    Attributes:
        name: Its name, the same through restarts.
        experts: What it holds, ascending.
        life: Counts its starts; an address is good for one life.
        address: Where it listens; None while it is not there.
    """

    name: str
    experts: tuple[int, ...]
    life: int = 0
    address: Address | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """All workers at one moment.

    Attributes:
        epoch: Counts changes.
        workers: By name.
    """

    epoch: int
    workers: Mapping[str, Worker]


def spread(num_experts: int, shards: int, replicas: int, layers: int = 1) -> Placement:
    """Consecutive experts to each shard, as evenly as it goes, each shard `replicas` times.

    Args:
        num_experts: E, of all layers together.
        shards: Parts.
        replicas: Workers that hold the same part.
        layers: Layers that the experts belong to, the same number to each: a shard gets its part of each of them.

    Raises:
        PoolError: More shards than experts, or a number below 1.
    """
    if min(num_experts, shards, replicas) < 1:
        raise PoolError(f"a pool needs numbers above 0, not {num_experts=}, {shards=}, {replicas=}")
    each = num_experts // layers
    if shards > each:
        raise PoolError(f"{shards} shards for {each} experts leave shards empty", hint="shards <= num_experts")
    cuts = [each * shard // shards for shard in range(shards + 1)]
    return {
        f"shard-{shard}.{replica}": tuple(
            layer * each + expert for layer in range(layers) for expert in range(cuts[shard], cuts[shard + 1])
        )
        for shard in range(shards)
        for replica in range(replicas)
    }


def check_placement(placement: Placement, num_experts: int) -> None:
    """Refuses a placement that leaves an expert nowhere, or names one that is not there.

    Raises:
        PoolError: Names the experts.
    """
    held = {expert for experts in placement.values() for expert in experts}
    if missing := sorted(set(range(num_experts)) - held):
        raise PoolError(f"no worker would hold experts {missing}")
    if unknown := sorted(held - set(range(num_experts))):
        raise PoolError(f"there are {num_experts} experts, no {unknown}")


def choose_holders(
    rows: Mapping[int, int], holders: Mapping[int, Collection[str]], turn: int = 0
) -> dict[str, list[int]]:
    """Shares the experts that have rows out to their holders, evenly and in few messages.

    Args:
        rows: Rows of each expert.
        holders: Living workers that hold it, at least one.
        turn: Rotates ties, so that calls take turns among replicas.

    Returns:
        Experts of each worker that gets a message, ascending.
    """
    load: dict[str, int] = {}
    chosen: dict[str, list[int]] = {}
    # Experts without a choice go first, then the large ones: the rest fills the gaps.
    for expert in sorted(rows, key=lambda e: (len(holders[e]) > 1, -rows[e], e)):
        among = sorted(holders[expert])
        turned = [*among[turn % len(among) :], *among[: turn % len(among)]]
        worker = min(turned, key=lambda w: load.get(w, _MESSAGE_ROWS))
        load[worker] = load.get(worker, 0) + rows[expert]
        chosen.setdefault(worker, []).append(expert)
    return {worker: sorted(experts) for worker, experts in chosen.items()}
