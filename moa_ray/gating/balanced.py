"""Gates in which experts choose tokens: strictly balanced gating and expert choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moa_ray.gating.gate import ROUTER_INIT_STD, Gate, project
from moa_ray.gating.routing import Routing, routing_from_mask


def batchwise_mask(scores_TE: Tensor, m: int) -> Tensor:
    """M_batchwise: True for the m best tokens of every expert (Shazeer et al. 2017, eq. 18)."""
    best_ME = scores_TE.topk(m, dim=0).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(0, best_ME, True)


def threshold_mask(scores_TE: Tensor, thresholds_E: Tensor) -> Tensor:
    """M_threshold: True where a token's score is above the expert's threshold (eq. 19)."""
    return scores_TE > thresholds_E


def batchwise_loss(scores_TE: Tensor, thresholds_E: Tensor, m: int) -> Tensor:
    """L_batchwise: 0 where thresholds choose as the batch does, above 0 elsewhere (eq. 20).

    As in the paper it has gradients in the thresholds and in the scores.

    Returns:
        A scalar, summed over tokens and experts.
    """
    wrong_TE = threshold_mask(scores_TE, thresholds_E).to(scores_TE) - batchwise_mask(scores_TE, m).to(scores_TE)
    return (wrong_TE * (scores_TE - thresholds_E)).sum()


class _ExpertsChoose(Gate):
    """What the gates of this file share: softmax scores, and m = k |X| / E tokens of each expert."""

    w_gate_DE: nn.Parameter

    def _create_weights(self, d_model: int) -> None:
        self.w_gate_DE = nn.Parameter(torch.randn(d_model, self.num_experts) * ROUTER_INIT_STD)

    def _scores(self, x_TD: Tensor) -> Tensor:
        return project(x_TD, self.w_gate_DE).softmax(dim=1)

    def _tokens_of_an_expert(self, tokens: int) -> int:
        return min(tokens, max(1, round(self.k * tokens / self.num_experts)))


class StrictlyBalanced(_ExpertsChoose):
    """Strictly balanced gating with learned thresholds (Shazeer et al. 2017, appendix F).

    In training every expert takes exactly m = k |X| / E tokens of the batch; in eval mode a token
    goes to the experts whose learned threshold it passes, so that a token's result does not
    depend on its neighbours. Weights are the masked softmax scores, normalised (eq. 16).

    The paper leaves three things open: here the thresholds start at 1/E (the score of an
    undecided gate), W_g at small random values (zeros would tie all tokens), and L_batchwise is
    divided by the number of tokens so that its scale does not depend on the batch.

    Args:
        num_experts: E, experts that choose.
        k: Experts of a token, on average.
        d_model: Width of the tokens; None: given by the `MoE` layer.
        w_threshold: Weight of L_batchwise, by which the thresholds are learned (eq. 20).

    Raises:
        GateError: `k` is below 1 or above `num_experts`.
    """

    thresholds_E: nn.Parameter

    def __init__(self, num_experts: int, k: int, *, d_model: int | None = None, w_threshold: float = 1.0) -> None:
        self.w_threshold = w_threshold
        super().__init__(num_experts, k, d_model=d_model)

    def _create_weights(self, d_model: int) -> None:
        super()._create_weights(d_model)
        self.thresholds_E = nn.Parameter(torch.full((self.num_experts,), 1 / self.num_experts))

    def _route(self, x_TD: Tensor) -> Routing:
        scores_TE = self._scores(x_TD)
        thresholds_E = self.thresholds_E.to(scores_TE.dtype)
        m = self._tokens_of_an_expert(x_TD.shape[0])
        mask_TE = batchwise_mask(scores_TE, m) if self.training else threshold_mask(scores_TE, thresholds_E)
        masked_TE = scores_TE * mask_TE
        # A token that no expert took has the sum 0 and stays without output.
        total_T1 = masked_TE.sum(1, keepdim=True).clamp_min(torch.finfo(masked_TE.dtype).tiny)
        routing = routing_from_mask(masked_TE / total_T1, mask_TE)
        if not self.training:
            return routing
        loss = self.w_threshold * batchwise_loss(scores_TE, thresholds_E, m) / x_TD.shape[0]
        return Routing(
            routing.experts_TK,
            routing.weights_TK,
            routing.importance_E,
            routing.load_E,
            {"threshold": loss},
            full=False,
        )


class ExpertChoice(_ExpertsChoose):
    """Expert choice (Zhou et al. 2022, arXiv 2202.09368): every expert takes its m best tokens.

    The mask is that of `StrictlyBalanced` in training, the weights are the plain softmax scores,
    and the same rule holds in eval mode. A token's experts therefore depend on the rest of the
    batch: not for causal models.
    """

    def _route(self, x_TD: Tensor) -> Routing:
        scores_TE = self._scores(x_TD)
        mask_TE = batchwise_mask(scores_TE, self._tokens_of_an_expert(x_TD.shape[0]))
        return routing_from_mask(scores_TE * mask_TE, mask_TE)
