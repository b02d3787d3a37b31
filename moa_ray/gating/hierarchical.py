"""Two-level gating (Shazeer et al. 2017, appendix B)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moa_ray.gating.errors import GateError
from moa_ray.gating.gate import Gate
from moa_ray.gating.losses import balance_losses
from moa_ray.gating.noisy_topk import NoisyTopK
from moa_ray.gating.routing import Routing, importance


class Hierarchical(Gate):
    """A primary noisy top-k gate chooses groups, a secondary one of each group chooses experts in it.

    Expert j of group i has the flat number i * group_size + j. Its weight is
    G_primary(x)_i * G_i(x)_j (eq. 12). Importance is the sum of that product (eq. 13), the load
    Load_primary(X)_i * Load_i(X^(i))_j / |X^(i)| (eq. 14), where X^(i) are the tokens sent to
    group i: without the first factor the primary gate would get no gradient from the load.

    Args:
        num_groups: Groups, the branching factor of the first level.
        group_size: Experts of a group.
        k_groups: Groups of a token.
        k_experts: Experts of a token within each of its groups.
        d_model: Width of the tokens; None: given by the `MoE` layer.
        w_importance: Weight of the loss on CV(Importance_H)^2.
        w_load: Weight of the loss on CV(Load_H)^2.

    Raises:
        GateError: A level has fewer members than it has to choose.
    """

    def __init__(
        self,
        num_groups: int,
        group_size: int,
        *,
        k_groups: int = 2,
        k_experts: int = 2,
        d_model: int | None = None,
        w_importance: float = 0.1,
        w_load: float = 0.1,
    ) -> None:
        if not (1 <= k_groups <= num_groups and 1 <= k_experts <= group_size):
            raise GateError(
                f"{k_groups=} cannot be chosen from {num_groups=}, or {k_experts=} from {group_size=}",
                hint="choose at least 1 and at most all of each level",
            )
        super().__init__(num_groups * group_size, k_groups * k_experts)
        self.group_size = group_size
        self.w_importance = w_importance
        self.w_load = w_load
        # The losses are taken over the flat experts, so the levels have none of their own.
        self.primary = NoisyTopK(num_groups, k_groups, w_importance=0, w_load=0)
        self.secondary = nn.ModuleList(
            NoisyTopK(group_size, k_experts, w_importance=0, w_load=0) for _ in range(num_groups)
        )
        if d_model is not None:
            self.materialize(d_model)

    def _create_weights(self, d_model: int) -> None:
        for gate in (self.primary, *self._groups()):
            gate.materialize(d_model)

    def _groups(self) -> list[NoisyTopK]:
        return [gate for gate in self.secondary if isinstance(gate, NoisyTopK)]

    def _route(self, x_TD: Tensor) -> Routing:
        first: Routing = self.primary(x_TD)
        tokens, k_groups = first.experts_TK.shape
        k_experts = self.k // k_groups
        experts_TKK = first.experts_TK.new_empty(tokens, k_groups, k_experts)
        weights_TKK = first.weights_TK.new_zeros(tokens, k_groups, k_experts)
        loads: list[Tensor] = []
        for group, gate in enumerate(self._groups()):
            token_N, slot_N = torch.where(first.experts_TK == group)
            if not len(token_N):  # no token, no load: X^(i) is empty
                loads.append(first.load_E.new_zeros(self.group_size))
                continue
            second: Routing = gate(x_TD[token_N])
            experts_TKK[token_N, slot_N] = second.experts_TK + group * self.group_size
            weights_NK = first.weights_TK[token_N, slot_N, None] * second.weights_TK
            weights_TKK = weights_TKK.index_put((token_N, slot_N), weights_NK)
            loads.append(first.load_E[group] * second.load_E / len(token_N))
        experts_TK, weights_TK = experts_TKK.flatten(1), weights_TKK.flatten(1)
        importance_E = importance(experts_TK, weights_TK, self.num_experts)
        load_E = torch.cat(loads)
        losses = balance_losses(importance_E, load_E, self.w_importance, self.w_load) if self.training else {}
        return Routing(experts_TK, weights_TK, importance_E, load_E, losses)
