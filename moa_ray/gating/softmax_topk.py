"""Gates without noise: softmax over all experts, and sigmoid scores with a balancing bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moa_ray.gating.gate import ROUTER_INIT_STD, Gate, project
from moa_ray.gating.routing import Routing, importance, token_counts


class _TopKOfScores(Gate):
    """Top k of some scores, weighted by the scores of the chosen, normalised."""

    w_gate_DE: nn.Parameter

    def _create_weights(self, d_model: int) -> None:
        self.w_gate_DE = nn.Parameter(torch.randn(d_model, self.num_experts) * ROUTER_INIT_STD)

    def _routing(self, scores_TE: Tensor, experts_TK: Tensor) -> Routing:
        chosen_TK = scores_TE.gather(1, experts_TK)
        weights_TK = chosen_TK / chosen_TK.sum(1, keepdim=True)
        importance_E = importance(experts_TK, weights_TK, self.num_experts)
        load_E = token_counts(experts_TK, self.num_experts).to(weights_TK.dtype)
        return Routing(experts_TK, weights_TK, importance_E, load_E)


class SoftmaxTopK(_TopKOfScores):
    """Softmax over all experts, top k of it, renormalised, as in Mixtral (arXiv 2401.04088, section 2.1).

    The weights equal a softmax over the logits of the chosen k.
    """

    def _route(self, x_TD: Tensor) -> Routing:
        scores_TE = project(x_TD, self.w_gate_DE).softmax(dim=1)
        return self._routing(scores_TE, scores_TE.topk(self.k, dim=1).indices)


class LossFreeBias(_TopKOfScores):
    """Sigmoid scores, chosen with a balancing bias and weighted without it (arXiv 2408.15664, algorithm 1).

    `end_step` moves every expert's bias by `update_rate` towards the mean load of the steps since
    the last call. There is no balancing loss and so no gradient that disturbs the model's own.
    Keep the module in float32 and train under autocast: bfloat16 would lose such small steps.

    Args:
        num_experts: E, experts to choose from.
        k: Experts of a token.
        d_model: Width of the tokens; None: given by the `MoE` layer.
        update_rate: u, how far a bias moves in one step, in units of the score (0 to 1).

    Raises:
        GateError: `k` is below 1 or above `num_experts`.
    """

    bias_E: Tensor
    counts_E: Tensor

    def __init__(self, num_experts: int, k: int, *, d_model: int | None = None, update_rate: float = 1e-3) -> None:
        super().__init__(num_experts, k, d_model=d_model)
        self.update_rate = update_rate
        self.register_buffer("bias_E", torch.zeros(num_experts))
        self.register_buffer("counts_E", torch.zeros(num_experts, dtype=torch.int64))

    def _route(self, x_TD: Tensor) -> Routing:
        scores_TE = project(x_TD, self.w_gate_DE).sigmoid()
        experts_TK = (scores_TE + self.bias_E).topk(self.k, dim=1).indices
        if self.training:
            self.counts_E += token_counts(experts_TK, self.num_experts)
        return self._routing(scores_TE, experts_TK)

    def end_step(self) -> None:
        """Raises the bias of experts below the mean load, lowers it above, and starts counting anew."""
        counts_E = self.counts_E.to(self.bias_E.dtype)
        self.bias_E += self.update_rate * (counts_E.mean() - counts_E).sign()
        self.counts_E.zero_()
