"""Gate maths for both planes: which experts a token goes to, how much each counts, how even the load is.

Touches torch and `moa_ray.errors`, nothing else; knows nothing of experts, dispatch or Ray.
A gate maps tokens of shape (T, D) to a `Routing`; see `gate.py` for the interface.
"""

from moa_ray.gating.balanced import (
    ExpertChoice,
    StrictlyBalanced,
    batchwise_loss,
    batchwise_mask,
    threshold_mask,
)
from moa_ray.gating.errors import GateError
from moa_ray.gating.gate import Gate
from moa_ray.gating.hierarchical import Hierarchical
from moa_ray.gating.load import kth_excluding, load_probability
from moa_ray.gating.losses import balance_losses, cv_squared
from moa_ray.gating.noisy_topk import NoisyTopK
from moa_ray.gating.routing import NO_EXPERT, Routing
from moa_ray.gating.softmax_topk import LossFreeBias, SoftmaxTopK
from moa_ray.gating.stats import GateStats

__all__ = [
    "NO_EXPERT",
    "ExpertChoice",
    "Gate",
    "GateError",
    "GateStats",
    "Hierarchical",
    "LossFreeBias",
    "NoisyTopK",
    "Routing",
    "SoftmaxTopK",
    "StrictlyBalanced",
    "balance_losses",
    "batchwise_loss",
    "batchwise_mask",
    "cv_squared",
    "kth_excluding",
    "load_probability",
    "threshold_mask",
]
