"""Adam over a whole model, its experts included, in this process or in the actors of a pool: the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from moa_ray.moe.remote.pool import ExpertPool

WEIGHTS = ("w_in_EDH", "w_out_EHD")
MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam:
    """The optimizer of a training run.

    Gradients are clipped by their norm over all parameters. It is taken from the norms of each expert's matrices, as
    shards know them, and of every other parameter, in the order of their names.

    Args:
        model: What is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._pools: Mapping[str, ExpertPool] = {}
        self._adam = torch.optim.Adam(model.parameters(), fused=True)

    def leave_to(self, pools: Mapping[str, ExpertPool]) -> None:
        """Experts that were parameters of the model are in pools now, by the name they have in the model."""
        state = self.state()
        self._pools = pools
        self._adam = torch.optim.Adam(self._model.parameters(), fused=True)
        self.load(state)

    def zero_grad(self) -> None:
        """Before a backward pass."""
        self._adam.zero_grad()

    def step(self, lr: float, clip_norm: float) -> None:
        """One step on clipped gradients.

        Args:
            lr: Learning rate.
            clip_norm: Gradients of a larger norm are scaled down to it.
        """
        norms = self._norms()
        total = torch.linalg.vector_norm(torch.cat([norms[name] for name in sorted(norms)]))
        scale = (clip_norm / (total + 1e-6)).clamp_max(1.0)
        grads = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(grads, scale)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        for pool in self._pools.values():
            pool.step(lr, float(scale))

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, with the experts that are elsewhere."""
        whole: dict[str, Tensor] = dict(self._model.state_dict())
        for place, pool in self._pools.items():
            whole |= {f"{place}.{name}": tensor for name, tensor in pool.state_dict().items()}
        return whole

    def state(self) -> dict[str, Tensor]:
        """Moments and steps as tensors named `optimizer/PARAMETER/FIELD`."""
        tensors = {
            f"optimizer/{name}/{field}": value
            for name, parameter in self._model.named_parameters()
            for field, value in self._adam.state[parameter].items()
        }
        for place, pool in self._pools.items():
            moments, version = pool.moments()
            for name, moment in moments.items():
                weight, _, field = name.partition(".")
                tensors[f"optimizer/{place}.{weight}/{field}"] = moment
                tensors[f"optimizer/{place}.{weight}/step"] = torch.tensor(float(version))
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, for what is in this process; the weights are loaded, so names and shapes fit."""
        state: dict[int, dict[str, Tensor]] = {}
        for index, (name, _) in enumerate(self._model.named_parameters()):
            prefix = f"optimizer/{name}/"
            state[index] = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        self._adam.load_state_dict({"state": state, "param_groups": self._adam.state_dict()["param_groups"]})

    def _norms(self) -> dict[str, Tensor]:
        norms: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.grad is None:
                continue
            parts = list(parameter.grad.unbind(0)) if name.endswith(WEIGHTS) else [parameter.grad]
            norms[name] = torch.stack(torch._foreach_norm(parts))
        device = next(self._model.parameters()).device
        for place, pool in self._pools.items():
            norms_2E = pool.gradient_norms().to(device)
            norms |= {f"{place}.{name}": norms_2E[row] for row, name in enumerate(WEIGHTS)}
        return norms
