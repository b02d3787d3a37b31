"""Mixture-of-Experts models of Hugging Face, their experts in shards: Mixtral, Qwen-MoE and their like.

What transformers' families share is the experts' module: called with tokens, chosen experts and weights.
That module is exchanged; everything else of the model stays as it is, `generate()` included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moa_ray.gating import Routing
from moa_ray.moe.dispatch import combine
from moa_ray.moe.errors import CheckpointError, PoolError
from moa_ray.moe.layer import run_experts
from moa_ray.moe.remote.pool import ExpertPool
from moa_ray.moe.remote.snapshot import Loaded, Sizes

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def shard_experts(model: nn.Module | Path | str, shards: int, **options: Any) -> Any:
    """Moves the expert blocks of a Mixture-of-Experts model into an `ExpertPool`.

    Args:
        model: A causal language model of transformers; its experts are taken out of it. Or the directory of
            a checkpoint: the experts' weights then go from its safetensors files to the shards, and never
            through this process.
        shards: Parts of each layer's experts; a shard holds its part of every layer.
        options: As in `ExpertPool.launch`.

    Returns:
        The model; its pool is `model.expert_pool`, whose `close()` ends the actors.

    Raises:
        PoolError: The model has no experts, or such as cannot be moved.
        CheckpointError: The files lack experts, or are damaged.
    """
    rest: Any = model if isinstance(model, nn.Module) else _without_experts(Path(model))
    found = dict(_experts_of(rest))
    sizes = _sizes(found)
    options = {"layers": len(found), **options}
    if isinstance(model, nn.Module):
        pool = ExpertPool.holding(Loaded(_weights(found)), sizes, shards, **options)
    else:
        files = Files(str(Path(model).absolute()), tuple(found), sizes.num_experts // len(found))
        options = {"activation": "swiglu", "dtype": sizes.dtype, "source": files, **options}
        pool = ExpertPool.launch(sizes.num_experts, sizes.d_model, sizes.d_hidden, shards, **options)
    for layer, name in enumerate(found):
        rest.set_submodule(name, _ShardedExperts(pool, layer, sizes.num_experts // len(found)))
    rest.expert_pool = pool
    return rest


class _ShardedExperts(nn.Module):
    """In the place of one layer's experts; the interface is transformers'."""

    def __init__(self, pool: ExpertPool, layer: int, num_experts: int) -> None:
        super().__init__()
        self._pool = pool
        self.num_experts = num_experts
        self._first = layer * num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights_TK = top_k_weights.float()
        nothing_E = weights_TK.new_zeros(self._pool.num_experts)
        chosen = Routing(top_k_index + self._first, weights_TK, nothing_E, nothing_E)
        routing, plan, y_RD = run_experts(x_TD, chosen, self._pool)
        return combine(y_RD, routing.weights_TK, plan).to(hidden_states.dtype).view(hidden_states.shape)


@dataclass(frozen=True, slots=True)
class Files:
    """The experts in a checkpoint's safetensors files, in either of the layouts that transformers reads.

    Attributes:
        directory: The checkpoint's.
        modules: Names of the experts' modules, layer by layer.
        per_layer: Experts of each.
    """

    directory: str
    modules: tuple[str, ...]
    per_layer: int

    def check(self, sizes: Sizes) -> None:
        """Finds all experts; reads no tensor."""
        homes = self._homes()
        lacking = [e for e in range(sizes.num_experts) if self._layout(homes, e) is None]
        if lacking:
            names = ", ".join(f"{self.modules[e // self.per_layer]}.{e % self.per_layer}" for e in lacking[:5])
            raise CheckpointError(f"{self.directory}: the checkpoint lacks {len(lacking)} experts, such as {names}")

    def load(self, sizes: Sizes, experts: Sequence[int]) -> Loaded:
        """Some experts, one by one."""
        homes = self._homes()
        ins: list[Tensor] = []
        outs: list[Tensor] = []
        for expert in experts:
            layout = self._layout(homes, expert)
            if layout is None:
                raise CheckpointError(f"{self.directory}: the checkpoint lacks expert {expert}")
            *into, out = (self._read(homes, name, index) for name, index in layout)
            ins.append(torch.cat(into).t())
            outs.append(out.t())
        tensors = {"w_in_EDH": torch.stack(ins), "w_out_EHD": torch.stack(outs)}
        for name, tensor in tensors.items():
            if tuple(tensor.shape[1:]) != sizes.shape(name):
                expected = sizes.shape(name)
                raise CheckpointError(f"{self.directory}: experts of shape {tuple(tensor.shape[1:])}, not {expected}")
        return Loaded({name: tensor.to(sizes.torch_dtype) for name, tensor in tensors.items()})

    def _layout(self, homes: dict[str, str], expert: int) -> list[tuple[str, int | None]] | None:
        """Tensors (and places in them) that make up [gate, up] and down of an expert."""
        module, index = self.modules[expert // self.per_layer], expert % self.per_layer
        mixtral = module.replace(".mlp.", ".block_sparse_moe.")
        layouts: list[list[tuple[str, int | None]]] = [
            [(f"{module}.gate_up_proj", index), (f"{module}.down_proj", index)],
            [(f"{module}.{index}.{part}_proj.weight", None) for part in ("gate", "up", "down")],
            [(f"{mixtral}.{index}.{part}.weight", None) for part in ("w1", "w3", "w2")],
        ]
        return next((layout for layout in layouts if all(name in homes for name, _ in layout)), None)

    def _read(self, homes: dict[str, str], name: str, index: int | None) -> Tensor:
        with safe_open(Path(self.directory) / homes[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
        return tensor

    def _homes(self) -> dict[str, str]:
        """The file of each tensor."""
        directory = Path(self.directory)
        try:
            if (directory / _INDEX).is_file():
                homes: dict[str, str] = json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"]
                return homes
            with safe_open(directory / _SINGLE, "pt") as file:
                return dict.fromkeys(file.keys(), _SINGLE)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{directory}: no safetensors of a model: {error}") from error


def _experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "has_gate"):  # what transformers marks experts with
            plain = module.has_gate and module.is_concatenated and not (module.has_bias or module.is_transposed)
            if not plain or getattr(module, "has_post_expert_norm", False) or not _is_silu(module):
                raise PoolError(
                    f"{name}: {type(module).__name__} is not SwiGLU without biases", hint="Mixtral, Qwen-MoE"
                )
            yield name, module


def _facts_of(module: nn.Module) -> nn.Module:
    """A module without weights that knows what `_experts_of` and `_sizes` ask."""
    facts = nn.Module()
    facts.__dict__.update({name: value for name, value in vars(module).items() if not name.startswith("_")})
    facts.act_fn = module.act_fn
    return facts


def _is_silu(module: nn.Module) -> bool:
    return isinstance(module.act_fn, nn.SiLU | transformers.activations.SiLUActivation)


def _sizes(found: dict[str, nn.Module]) -> Sizes:
    if not found:
        raise PoolError("the model has no experts", hint="a Mixture-of-Experts model of transformers 5")
    modules: list[Any] = list(found.values())
    shapes = {(m.num_experts, m.hidden_dim, m.intermediate_dim) for m in modules}
    if len(shapes) > 1:
        raise PoolError(f"the model's layers have experts of different sizes: {sorted(map(str, shapes))}")
    number, d_model, d_hidden = shapes.pop()
    dtype = str(modules[0].config.dtype or torch.float32).removeprefix("torch.")
    return Sizes(number * len(found), d_model, d_hidden, "swiglu", dtype)


def _weights(found: dict[str, nn.Module]) -> dict[str, Tensor]:
    pairs = {"w_in_EDH": "gate_up_proj", "w_out_EHD": "down_proj"}
    return {ours: torch.cat([m.get_parameter(t).detach().mT for m in found.values()]) for ours, t in pairs.items()}


def _without_experts(directory: Path) -> Any:
    """The rest of a model, from its checkpoint: a subclass that has dropped its experts' weights before any is read."""
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        whole: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: no model of transformers: {error}") from error

    def build(self: Any, config: Any, *rest: Any, **named: Any) -> None:
        whole.__init__(self, config, *rest, **named)
        for name, module in list(_experts_of(self)):
            self.set_submodule(name, _facts_of(module))
        self._keys_to_ignore_on_load_unexpected = {r"\.experts\."}

    body = {"__init__": build, "__module__": whole.__module__}
    without: Any = type(whole.__name__, (whole,), body)
    return without.from_pretrained(directory)
