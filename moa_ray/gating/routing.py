"""What a gate answers: for each token its experts and their weights, as a table of K slots a token.

Shape suffixes used in this room:
    T tokens   D model width   E experts   K slots of a token   G groups of experts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

NO_EXPERT = -1
"""Marks an empty slot in `Routing.experts_TK`."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The routes that a gate chose for one batch of tokens.

    Attributes:
        experts_TK: Expert of each slot, int64; `NO_EXPERT` marks an empty slot.
        weights_TK: Weight G(x) of each slot, float32 or float64; 0 in empty slots.
        importance_E: Importance of each expert: its weights summed over the batch
            (Shazeer et al. 2017, eq. 6).
        load_E: Load of each expert, in tokens: the smooth estimator where the gate has one
            (eq. 10), else the plain number of tokens.
        losses: Terms to add to the training loss, already scaled; empty in eval mode.
        full: Whether it is known that no slot is empty; lets the dispatcher skip a device sync.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    importance_E: Tensor
    load_E: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    full: bool = True

    @property
    def num_experts(self) -> int:
        """E, the number of experts that the gate chooses from."""
        return self.load_E.shape[0]

    def counts(self) -> Tensor:
        """Number of tokens that each expert receives, int64 of shape (E,)."""
        return token_counts(self.experts_TK, self.num_experts)

    def keep(self, keep_TK: Tensor) -> Routing:
        """Empties the slots where `keep_TK` is False; the slots left share their token's whole weight.

        A token of which no slot is left gets nothing from the layer. This is what happens to
        tokens over an expert's capacity, and to the experts of a worker that is not there.
        """
        keep_TK = keep_TK & (self.experts_TK != NO_EXPERT)
        kept_TK = self.weights_TK.masked_fill(~keep_TK, 0)
        total_T1 = self.weights_TK.sum(1, keepdim=True)
        left_T1 = kept_TK.sum(1, keepdim=True).clamp_min(torch.finfo(kept_TK.dtype).eps)
        return replace(
            self,
            experts_TK=self.experts_TK.masked_fill(~keep_TK, NO_EXPERT),
            weights_TK=kept_TK * (total_T1 / left_T1),
            full=False,
        )


def token_counts(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Number of tokens in which each expert stands, int64 of shape (E,); empty slots do not count."""
    # One bin more in front takes the empty slots, so that no mask (and no device sync) is needed.
    return (experts_TK.flatten() + 1).bincount(minlength=num_experts + 1)[1:]


def importance(experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """Importance of each expert: its weights summed over the batch (Shazeer et al. 2017, eq. 6).

    Args:
        experts_TK: Expert of each slot; no expert twice in a row, no empty slot.
        weights_TK: Weight of each slot.
        num_experts: E.

    Returns:
        Tensor of shape (E,), differentiable in the weights.
    """
    # Scattering to a dense table first keeps the order of summation fixed on every device.
    dense_TE = weights_TK.new_zeros(weights_TK.shape[0], num_experts)
    return dense_TE.scatter(1, experts_TK, weights_TK).sum(0)


def routing_from_mask(weights_TE: Tensor, mask_TE: Tensor) -> Routing:
    """Builds the table of slots of a gate that gives each token its own number of experts.

    Args:
        weights_TE: Weight of every (token, expert) pair, 0 outside the mask.
        mask_TE: Which experts each token goes to.

    Returns:
        A routing with as many slots as the busiest token has experts (at least one), in
        ascending order of experts.
    """
    slots = max(1, int(mask_TE.sum(1).max()))
    order_TK = mask_TE.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    filled_TK = mask_TE.gather(1, order_TK)
    return Routing(
        experts_TK=order_TK.masked_fill(~filled_TK, NO_EXPERT),
        weights_TK=weights_TE.gather(1, order_TK).masked_fill(~filled_TK, 0),
        importance_E=weights_TE.sum(0),
        load_E=mask_TE.sum(0).to(weights_TE.dtype),
        full=False,
    )
