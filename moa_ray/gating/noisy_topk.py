"""Noisy top-k gating (Shazeer et al. 2017, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa_ray.gating.gate import Gate, project
from moa_ray.gating.load import load_probability
from moa_ray.gating.losses import balance_losses
from moa_ray.gating.routing import Routing, importance, token_counts

_MIN_STD = 1e-6  # softplus underflows to 0 for very negative inputs; the load estimator divides by it


class NoisyTopK(Gate):
    """Noisy top-k gating: G(x) = Softmax(KeepTopK(H(x), k)), eqs. 3-5.

    H(x) = x W_g + StandardNormal() * Softplus(x W_noise). The softmax runs over the chosen k
    only. W_g and W_noise start at zero, so that the first choices are pure noise and balanced
    (appendix A). In eval mode there is no noise and the load is the plain token count, as it
    also is for k = E, where the estimator is not defined.

    Args:
        num_experts: E, experts to choose from.
        k: Experts of a token. k = 1 gives the gate no gradient through its weights.
        d_model: Width of the tokens; None: given by the `MoE` layer.
        w_importance: Weight of the loss on CV(importance)^2 (eq. 7).
        w_load: Weight of the loss on CV(load)^2 (eq. 11).

    Raises:
        GateError: `k` is below 1 or above `num_experts`.
    """

    w_gate_DE: nn.Parameter
    w_noise_DE: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        k: int,
        *,
        d_model: int | None = None,
        w_importance: float = 0.1,
        w_load: float = 0.1,
    ) -> None:
        self.w_importance = w_importance
        self.w_load = w_load
        super().__init__(num_experts, k, d_model=d_model)

    def _create_weights(self, d_model: int) -> None:
        self.w_gate_DE = nn.Parameter(torch.zeros(d_model, self.num_experts))
        self.w_noise_DE = nn.Parameter(torch.zeros(d_model, self.num_experts))

    def _route(self, x_TD: Tensor) -> Routing:
        clean_TE = project(x_TD, self.w_gate_DE)
        if not self.training:
            return self._routing(*clean_TE.topk(self.k, dim=1))
        std_TE = F.softplus(project(x_TD, self.w_noise_DE)).clamp_min(_MIN_STD)
        noisy_TE = clean_TE + torch.randn_like(clean_TE) * std_TE
        if self.k == self.num_experts:
            return self._routing(*noisy_TE.topk(self.k, dim=1))
        top_TJ, index_TJ = noisy_TE.topk(self.k + 1, dim=1)
        load_E = load_probability(clean_TE, std_TE, top_TJ, index_TJ).sum(0)
        return self._routing(top_TJ[:, :-1], index_TJ[:, :-1], load_E)

    def _routing(self, top_TK: Tensor, experts_TK: Tensor, load_E: Tensor | None = None) -> Routing:
        weights_TK = top_TK.softmax(dim=1)
        importance_E = importance(experts_TK, weights_TK, self.num_experts)
        if load_E is None:
            load_E = token_counts(experts_TK, self.num_experts).to(weights_TK.dtype)
        losses = balance_losses(importance_E, load_E, self.w_importance, self.w_load) if self.training else {}
        return Routing(experts_TK, weights_TK, importance_E, load_E, losses)
