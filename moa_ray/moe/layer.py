"""The Mixture-of-Experts layer: gate, dispatch, experts, combine.

Shape suffixes: see `grouped.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moa_ray.gating import Gate, GateError, GateStats, Routing
from moa_ray.moe.dispatch import DispatchPlan, combine, dispatch, limit_to_capacity, plan_dispatch
from moa_ray.moe.errors import ExpertsLost
from moa_ray.moe.experts import Experts, RemoteExperts


@dataclass(frozen=True, slots=True)
class MoEAux:
    """What a layer's call says besides its result.

    Attributes:
        loss: Sum of `losses`, to add to the training loss; 0 in eval mode.
        losses: The gate's balancing losses by name, already scaled.
        stats: Importance, load and balance of this batch.
        routing: The routes that were used, after any drop.
    """

    loss: Tensor
    losses: Mapping[str, Tensor]
    stats: GateStats
    routing: Routing


class MoE(nn.Module):
    """A Mixture-of-Experts layer: y = sum_i G(x)_i E_i(x) (Shazeer et al. 2017, eq. 1).

    Only the experts that the gate chose are computed. Without `capacity_factor` no token is
    dropped.

    Args:
        d_model: D, width of tokens.
        gate: Chooses experts; is given its width here if it has none.
        experts: Runs them, in this process or elsewhere.
        capacity_factor: None: no limit. Else an expert takes at most
            ceil(capacity_factor * T * k / E) tokens; see `limit_to_capacity`.
        shared: A module that every token goes through besides its experts, such as `FeedForward`.
        debug: Whether to look for NaN and infinity in inputs, weights and results; slow.

    Raises:
        GateError: Gate, experts and `d_model` do not fit each other, or a capacity that is no limit above 0.
    """

    def __init__(
        self,
        d_model: int,
        gate: Gate,
        experts: Experts,
        *,
        capacity_factor: float | None = None,
        shared: nn.Module | None = None,
        debug: bool = False,
    ) -> None:
        super().__init__()
        if gate.num_experts != experts.num_experts:
            raise GateError(f"the gate chooses from {gate.num_experts} experts, there are {experts.num_experts}")
        if experts.d_model != d_model:
            raise GateError(f"the experts have d_model={experts.d_model}, the layer {d_model}")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise GateError(f"capacity_factor={capacity_factor} is no limit above 0", hint="1.0 to 2.0, or None")
        gate.materialize(d_model)
        self.d_model = d_model
        self.gate = gate
        self.experts = experts
        self.shared = shared
        self.capacity_factor = capacity_factor
        self.debug = debug

    def forward(self, x: Tensor) -> tuple[Tensor, MoEAux]:
        """Runs the layer.

        Args:
            x: Token vectors of shape (..., d_model); all leading dimensions are one batch of tokens.

        Returns:
            The result, of the shape and dtype of `x` (of the autocast dtype where that is on), and
            losses and statistics.

        Raises:
            GateError: Wrong shape or dtype, no tokens, or in debug mode a value that is not finite.
        """
        self._check_input(x)
        x_TD = x.reshape(-1, self.d_model)
        chosen: Routing = self.gate(x_TD)
        routing, plan, y_RD = run_experts(x_TD, chosen, self.experts, self._limit)
        y_TD = combine(y_RD, routing.weights_TK, plan).to(y_RD.dtype)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        if self.debug:
            _check_finite({"gate weights": routing.weights_TK, "expert results": y_RD, "result": y_TD})
        loss = sum(routing.losses.values(), start=routing.weights_TK.new_zeros(()))
        stats = GateStats.of(chosen, plan.counts_E)
        return y_TD.view(x.shape), MoEAux(loss, routing.losses, stats, routing)

    def end_step(self) -> None:
        """Call once after each optimizer step: gates that adapt without gradients do so here."""
        self.gate.end_step()

    def _limit(self, chosen: Routing) -> Routing:
        if self.capacity_factor is None:
            return chosen
        fair_share = chosen.experts_TK.shape[0] * self.gate.k / self.gate.num_experts
        return limit_to_capacity(chosen, math.ceil(self.capacity_factor * fair_share))

    def _check_input(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[-1] != self.d_model:
            raise GateError(f"x has shape {tuple(x.shape)}, expected (tokens, {self.d_model})")
        weight = next(self.parameters())
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise GateError(f"x has dtype {x.dtype}, the layer's weights {weight.dtype}", hint="x.to(...) or autocast")
        if self.debug:
            _check_finite({"x": x, **dict(self.named_parameters()), **dict(self.named_buffers())})


def run_experts(
    x_TD: Tensor, chosen: Routing, experts: Experts, limit: Callable[[Routing], Routing] = lambda routing: routing
) -> tuple[Routing, DispatchPlan, Tensor]:
    """Sends tokens through the experts chosen for them, without those that are gone.

    Args:
        x_TD: Tokens.
        chosen: What the gate chose.
        experts: Run the rows.
        limit: Drops further routes.

    Returns:
        The routes that were used, their plan, and the results of their rows, (R, D).
    """
    living_E = experts.living() if isinstance(experts, RemoteExperts) else None
    while True:
        routing = chosen
        if living_E is not None:
            routing = chosen.keep(living_E.to(x_TD.device)[chosen.experts_TK.clamp_min(0)])
        routing = limit(routing)
        plan = plan_dispatch(routing)
        try:
            return routing, plan, experts(dispatch(x_TD, plan), plan.counts_E)
        except ExpertsLost as lost:  # the others share their weight; each round has fewer experts than the last
            living_E = torch.ones(experts.num_experts, dtype=torch.bool) if living_E is None else living_E
            living_E[list(lost.experts)] = False


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor)
        if bad.any():
            first = tuple(bad.nonzero()[0].tolist())
            raise GateError(f"{name} has {int(bad.sum())} values that are NaN or infinite, the first at {first}")
