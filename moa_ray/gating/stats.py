"""How evenly a gate spreads its tokens, in the units of the papers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moa_ray.gating.losses import cv_squared
from moa_ray.gating.routing import Routing


@dataclass(frozen=True, slots=True)
class GateStats:
    """Sums over one batch or, added up, over many; detached from the graph.

    Attributes:
        importance_E: Gate weights summed over tokens, shape (E,).
        load_E: Load of each expert in tokens: the smooth estimate where the gate has one.
        counts_E: Tokens that each expert really received, int64.
        routes: Routes that the gate chose, before any was dropped; int64 scalar.
    """

    importance_E: Tensor
    load_E: Tensor
    counts_E: Tensor
    routes: Tensor

    @classmethod
    def of(cls, chosen: Routing, counts_E: Tensor) -> GateStats:
        """Statistics of what a gate chose and of the tokens that then reached each expert."""
        return cls(chosen.importance_E.detach(), chosen.load_E.detach(), counts_E, chosen.counts().sum())

    def __add__(self, other: GateStats) -> GateStats:
        return GateStats(
            self.importance_E + other.importance_E,
            self.load_E + other.load_E,
            self.counts_E + other.counts_E,
            self.routes + other.routes,
        )

    @property
    def cv_importance(self) -> float:
        """CV(Importance) (Shazeer et al. 2017, table 6)."""
        return float(cv_squared(self.importance_E).sqrt())

    @property
    def cv_load(self) -> float:
        """CV(Load) (table 6)."""
        return float(cv_squared(self.load_E).sqrt())

    @property
    def max_over_mean_load(self) -> float:
        """max(Load) / mean(Load) (table 6); 1 is perfect balance."""
        return float(self.load_E.max() / self.load_E.mean())

    @property
    def max_vio(self) -> float:
        """MaxVio = (max - mean) / mean of the received tokens (arXiv 2408.15664); 0 is perfect."""
        counts_E = self.counts_E.double()
        return float(counts_E.max() / counts_E.mean() - 1)

    @property
    def entropy(self) -> float:
        """Entropy of the shares of received tokens, in nats; log E is perfect balance."""
        return float(torch.special.entr(self.counts_E.double() / self.counts_E.sum()).sum())

    @property
    def dropped(self) -> float:
        """Share of the routes that found their expert full, 0 to 1."""
        return float(1 - self.counts_E.sum() / self.routes)

    def summary(self) -> dict[str, float]:
        """All scalars by name, for logs."""
        names = ("cv_importance", "cv_load", "max_over_mean_load", "max_vio", "entropy", "dropped")
        return {name: getattr(self, name) for name in names}
