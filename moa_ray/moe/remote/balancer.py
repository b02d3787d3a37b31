"""How busy the experts of a pool are, and a loop that replicates the hot ones while calls go on."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moa_ray.errors import ClusterError
from moa_ray.gating import cv_squared
from moa_ray.moe.remote.placement import Placement
from moa_ray.moe.remote.planner import plan

if TYPE_CHECKING:
    from moa_ray.moe.remote.pool import ExpertPool


@dataclass(frozen=True, slots=True)
class Load:
    """What the experts of a pool have taken; importance, which only gates know, is in `GateStats`.

    Attributes:
        rows_E: Rows (tokens times experts of each) that each expert computed, float64.
        rows_of: Rows that each worker computed.
    """

    rows_E: Tensor
    rows_of: Mapping[str, float]

    @property
    def cv(self) -> float:
        """CV(Load) over experts (Shazeer et al. 2017, table 6)."""
        return float(cv_squared(self.rows_E).sqrt())

    @property
    def max_over_mean(self) -> float:
        """max(Load) / mean(Load) over experts (table 6); 1 is perfect balance."""
        return float(self.rows_E.max() / self.rows_E.mean())

    @property
    def workers_max_over_mean(self) -> float:
        """The same over workers: how much longer the busiest one takes than it would have to."""
        rows_W = torch.tensor(list(self.rows_of.values()), dtype=torch.float64)
        return float(rows_W.max() / rows_W.mean())


class LoadMeter:
    """Turns the counters of workers into loads since the last look; a restarted worker counts from 0 again."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._before: dict[tuple[str, int], int] = {}

    def read(self, facts: Mapping[str, Mapping[str, Any]]) -> Load:
        """From `ExpertPool.facts`."""
        rows_E = torch.zeros(self._num_experts, dtype=torch.float64)
        rows_of: dict[str, float] = {}
        now = {(name, expert): n for name, fact in facts.items() for expert, n in fact["rows"].items()}
        for (name, expert), count in now.items():
            before = self._before.get((name, expert), 0)
            new = count - before if count >= before else count
            rows_E[expert] += new
            rows_of[name] = rows_of.get(name, 0) + new
        self._before = now
        return Load(rows_E, rows_of)


class Balancer:
    """Replicates hot experts, again and again, in a thread of its own; a context.

    Args:
        pool: As `launch` returned it.
        spare: Experts that each worker may hold besides its even share of each layer.
        layers: Of the pool, as in `launch`; each is balanced by itself, since they run one after the other.
        every_s: Seconds between two looks.
        worth: Share of the busiest worker's load that a new placement must save.
    """

    def __init__(
        self, pool: ExpertPool, *, spare: int = 1, layers: int = 1, every_s: float = 10.0, worth: float = 0.1
    ) -> None:
        self._pool = pool
        self._spare = spare
        self._layers = layers
        self._every_s = every_s
        self._worth = worth
        self._meter = LoadMeter(pool.num_experts)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="moa-balancer")
        self.moves = 0
        self.trouble = ""

    def step(self) -> bool:
        """Looks once at the load since the last look; returns whether experts were moved."""
        load = self._meter.read(self._pool.facts())
        before = self._pool.placement
        after = self._planned(load.rows_E.tolist(), list(before))
        if busiest(after, load.rows_E) > (1 - self._worth) * busiest(before, load.rows_E):
            return False
        self._pool.place(after)
        self.moves += 1
        return True

    def __enter__(self) -> Balancer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.step()
            except ClusterError as error:  # a worker died meanwhile: it comes back, and so does the next look
                self.trouble = error.message

    def _planned(self, rows: Sequence[float], workers: Sequence[str]) -> Placement:
        each = len(rows) // self._layers
        slots = min(each, -(-each // len(workers)) + self._spare)
        held: dict[str, tuple[int, ...]] = dict.fromkeys(workers, ())
        for first in range(0, len(rows), each):
            for name, experts in plan(rows[first : first + each], workers, slots).items():
                held[name] += tuple(first + expert for expert in experts)
        return held


def busiest(placement: Placement, rows_E: Tensor) -> float:
    """Rows of the busiest worker, if the holders of an expert share its rows evenly."""
    holders = [sum(expert in experts for experts in placement.values()) for expert in range(len(rows_E))]
    return max(sum(float(rows_E[e]) / holders[e] for e in experts) for experts in placement.values())
