"""Mixture-of-Experts: gate, dispatch, experts and combine as one torch module, and a language model with it.

Touches `moa_ray.gating`, `moa_ray.errors`, torch, numpy, safetensors, pydantic, yaml and rich.
`MoE` takes any `Experts`; `LocalExperts` run in this process and are the reference that every
other placement must equal bit for bit.

`ExpertPool`, `Router` and what goes with them live in `remote`, the one part that knows Ray, and load
when they are first used.

Inside: `layer` (the module) over `dispatch` (tokens to rows and back), `experts` and `grouped`
(a matrix per expert); above them `model`, `text`, `config`, `train`, `checkpoint`, `generate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moa_ray.gating import (
    ExpertChoice,
    Gate,
    GateError,
    GateStats,
    Hierarchical,
    LossFreeBias,
    NoisyTopK,
    Routing,
    SoftmaxTopK,
    StrictlyBalanced,
)
from moa_ray.moe.errors import (
    CheckpointError,
    ConfigError,
    ExpertsLost,
    PoisonedBatch,
    PoolError,
    PoolLost,
    StalePool,
    TrainingError,
)
from moa_ray.moe.experts import Experts, FeedForward, LocalExperts, RemoteExperts
from moa_ray.moe.layer import MoE, MoEAux
from moa_ray.moe.model import LanguageModel

if TYPE_CHECKING:
    from moa_ray.moe.remote.balancer import Balancer
    from moa_ray.moe.remote.hf import shard_experts
    from moa_ray.moe.remote.peers import Patience
    from moa_ray.moe.remote.pool import ExpertPool
    from moa_ray.moe.remote.router import Router
    from moa_ray.moe.remote.snapshot import Fresh, Snapshots

_HOMES = {
    "Balancer": "moa_ray.moe.remote.balancer",
    "ExpertPool": "moa_ray.moe.remote.pool",
    "Fresh": "moa_ray.moe.remote.snapshot",
    "Patience": "moa_ray.moe.remote.peers",
    "Router": "moa_ray.moe.remote.router",
    "Snapshots": "moa_ray.moe.remote.snapshot",
    "shard_experts": "moa_ray.moe.remote.hf",
}

__all__ = [
    "Balancer",
    "CheckpointError",
    "ConfigError",
    "ExpertChoice",
    "ExpertPool",
    "Experts",
    "ExpertsLost",
    "FeedForward",
    "Fresh",
    "Gate",
    "GateError",
    "GateStats",
    "Hierarchical",
    "LanguageModel",
    "LocalExperts",
    "LossFreeBias",
    "MoE",
    "MoEAux",
    "NoisyTopK",
    "Patience",
    "PoisonedBatch",
    "PoolError",
    "PoolLost",
    "RemoteExperts",
    "Router",
    "Routing",
    "Snapshots",
    "SoftmaxTopK",
    "StalePool",
    "StrictlyBalanced",
    "TrainingError",
    "shard_experts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moa_ray.moe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
