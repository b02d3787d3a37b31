"""The training file of `moa-ray moe train`: what its keys mean, and how it becomes a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from moa_ray.gating import Gate, Hierarchical, LossFreeBias, NoisyTopK, SoftmaxTopK, StrictlyBalanced
from moa_ray.moe.errors import ConfigError
from moa_ray.moe.experts import Activation, FeedForward, LocalExperts
from moa_ray.moe.layer import MoE
from moa_ray.moe.model import DenseLayer, LanguageModel, Layer, LSTMLayer, MoELayer
from moa_ray.moe.text import Level

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _GateConfig(_Strict):
    def build(self) -> Gate:
        raise NotImplementedError

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        self.build()  # a gate without width has no weights yet; its complaints become those of the file
        return self


class NoisyTopKConfig(_GateConfig):
    """Noisy top-k gating with balancing losses."""

    kind: Literal["noisy_top_k"] = "noisy_top_k"
    experts: Positive
    k: Positive = 4
    w_importance: Weight = 0.1
    w_load: Weight = 0.1

    def build(self) -> Gate:
        """The gate, its width still open."""
        return NoisyTopK(self.experts, self.k, w_importance=self.w_importance, w_load=self.w_load)


class HierarchicalConfig(_GateConfig):
    """Two levels of noisy top-k gating: `groups` times `group_size` experts."""

    kind: Literal["hierarchical"]
    groups: Positive
    group_size: Positive
    k_groups: Positive = 2
    k_experts: Positive = 2
    w_importance: Weight = 0.1
    w_load: Weight = 0.1

    def build(self) -> Gate:
        """The gate, its width still open."""
        return Hierarchical(
            self.groups,
            self.group_size,
            k_groups=self.k_groups,
            k_experts=self.k_experts,
            w_importance=self.w_importance,
            w_load=self.w_load,
        )


class OtherGateConfig(_GateConfig):
    """A gate without balancing losses of its own to weigh."""

    kind: Literal["strictly_balanced", "loss_free", "softmax_top_k"]
    experts: Positive
    k: Positive = 4

    def build(self) -> Gate:
        """The gate, its width still open."""
        match self.kind:
            case "strictly_balanced":
                return StrictlyBalanced(self.experts, self.k)
            case "loss_free":
                return LossFreeBias(self.experts, self.k)
            case "softmax_top_k":
                return SoftmaxTopK(self.experts, self.k)


class MoEConfig(_Strict):
    """A Mixture-of-Experts layer between the two LSTMs."""

    kind: Literal["moe"]
    gate: Annotated[NoisyTopKConfig | HierarchicalConfig | OtherGateConfig, Field(discriminator="kind")]
    d_hidden: Positive
    activation: Activation = "relu"
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    recompute: bool = False
    shared_hidden: Positive | None = None
    debug: bool = False

    def build(self, d_model: int) -> list[Layer]:
        """The layer, alone in its list."""
        gate = self.gate.build()
        experts = LocalExperts(
            gate.num_experts, d_model, self.d_hidden, activation=self.activation, recompute=self.recompute
        )
        shared = None
        if self.shared_hidden:
            shared = FeedForward(d_model, self.shared_hidden, activation=self.activation)
        moe = MoE(d_model, gate, experts, capacity_factor=self.capacity_factor, shared=shared, debug=self.debug)
        return [MoELayer(moe)]


class DenseConfig(_Strict):
    """A feed-forward network instead: one width for MoE-1-Wide, several for MoE-1-Deep."""

    kind: Literal["dense"]
    hidden: Annotated[list[Positive], Field(min_length=1)]

    def build(self, d_model: int) -> list[Layer]:
        """The layer, alone in its list."""
        return [DenseLayer(d_model, self.hidden)]


class LSTMConfig(_Strict):
    """More LSTMs instead: two for the paper's 4xLSTM."""

    kind: Literal["lstm"]
    layers: Positive = 2

    def build(self, d_model: int) -> list[Layer]:
        """The layers."""
        return [LSTMLayer(d_model) for _ in range(self.layers)]


class ModelConfig(_Strict):
    """The model: embedding, LSTM, `middle`, LSTM, softmax."""

    d_model: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    middle: Annotated[MoEConfig | DenseConfig | LSTMConfig, Field(discriminator="kind")]

    def build(self, vocab_size: int) -> LanguageModel:
        """The model with fresh weights from torch's global random state."""
        layers = [LSTMLayer(self.d_model), *self.middle.build(self.d_model), LSTMLayer(self.d_model)]
        return LanguageModel(vocab_size, self.d_model, layers, self.dropout)


class DataConfig(_Strict):
    """The corpus: text files, gzip or plain; relative paths start at the working directory."""

    train: Path
    valid: Path | None = None
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    level: Level = "word"
    vocab_size: Positive | None = 10_000
    streams: Positive = 32
    window: Positive = 32


class OptimConfig(_Strict):
    """Adam; the rate rises over `warmup_steps` to `lr`, then falls as step^-1/2 (appendix C.1)."""

    lr: Annotated[float, Field(gt=0)] = 2e-3
    warmup_steps: Positive = 1000
    clip_norm: Annotated[float, Field(gt=0)] = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        number = step + 1
        return self.lr * min(number / self.warmup_steps, math.sqrt(self.warmup_steps / number))


class PoolConfig(_Strict):
    """Experts in actors while the model trains; the keys are those of `ExpertPool.launch`."""

    shards: Positive = 1
    replicas: Positive = 1
    num_cpus_per_shard: Weight = 1.0
    num_gpus_per_shard: Weight = 0.0
    snapshot_dir: Path | None = None
    snapshot_every: Positive = 20


class TrainConfig(_Strict):
    """A whole training run."""

    data: DataConfig
    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    steps: Positive
    output: Path
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    log_every: Positive = 50
    eval_every: Positive = 500
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2
    sampled_softmax: Positive | None = None
    device: str = "cpu"
    autocast: Literal["bfloat16"] | None = None
    pool: PoolConfig | None = None

    @model_validator(mode="after")
    def _has_what_a_pool_needs(self) -> Self:
        if self.pool and self.model.middle.kind != "moe":
            raise ValueError("pool needs model.middle.kind: moe, whose experts it holds")
        if self.pool and self.autocast:
            raise ValueError("pool keeps experts in float32: no autocast beside it")
        return self

    @model_validator(mode="after")
    def _samples_by_frequency(self) -> Self:
        if self.sampled_softmax and self.data.level == "byte":
            raise ValueError("sampled_softmax needs data.level: word, whose numbers fall with frequency")
        return self


def load_config(path: Path) -> TrainConfig:
    """Reads a training file.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or has a wrong or unknown key; the
            message names the file and the key.
    """
    try:
        return TrainConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise ConfigError("; ".join(f"{path}: {_problem(e)}" for e in error.errors())) from error


def _problem(error: ErrorDetails) -> str:
    message = " ".join(error["msg"].removeprefix("Value error, ").replace("\n  hint:", ";").split())
    return f"{'.'.join(map(str, error['loc'])) or 'file'}: {message}"
