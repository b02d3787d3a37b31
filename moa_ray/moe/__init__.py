"""Mixture-of-Experts: gate, dispatch, experts and combine as one torch module, and a language model with it.

Touches `moa_ray.gating`, `moa_ray.errors`, torch, numpy, safetensors, pydantic, yaml and rich.
`MoE` takes any `Experts`; `LocalExperts` run in this process and are the reference that every
other placement must equal bit for bit.

Inside: `layer` (the module) over `dispatch` (tokens to rows and back), `experts` and `grouped`
(a matrix per expert); above them `model`, `text`, `config`, `train`, `checkpoint`, `generate`.
"""

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
from moa_ray.moe.errors import CheckpointError, ConfigError, TrainingError
from moa_ray.moe.experts import Experts, FeedForward, LocalExperts
from moa_ray.moe.layer import MoE, MoEAux
from moa_ray.moe.model import LanguageModel

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ExpertChoice",
    "Experts",
    "FeedForward",
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
    "Routing",
    "SoftmaxTopK",
    "StrictlyBalanced",
    "TrainingError",
]
