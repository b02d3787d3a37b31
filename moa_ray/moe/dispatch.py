"""Tokens to experts and back: sorting rows by expert, capacity, and the weighted sum.

Shape suffixes: see `grouped.py`.

Both directions sum in a fixed order, forward and backward: a token's rows in the order of its
slots, an expert's rows in the order of tokens. That order does not depend on where the experts
run, so experts on other machines can give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa_ray.gating import NO_EXPERT, Routing

_NO_ROW = -1


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """Where each route's row lies among the rows sorted by expert.

    Attributes:
        token_R: Token of each row.
        route_R: Slot of each row, as an index into the flattened (T, K) table.
        row_TK: Row of each slot, -1 for an empty slot; the inverse of `route_R`.
        counts_E: Rows of each expert, int64.
        full: Whether no slot is empty.
    """

    token_R: Tensor
    route_R: Tensor
    row_TK: Tensor
    counts_E: Tensor
    full: bool


def plan_dispatch(routing: Routing) -> DispatchPlan:
    """Sorts the routes by expert and, within an expert, by token."""
    experts_TK = routing.experts_TK
    slots = experts_TK.shape[1]
    counts_E = routing.counts()
    key_S = experts_TK.flatten()
    if not routing.full:  # empty slots sort behind the last expert
        key_S = key_S.masked_fill(key_S == NO_EXPERT, routing.num_experts)
    route_R = key_S.argsort(stable=True)
    if not routing.full:
        route_R = route_R[: int(counts_E.sum())]
    row_S = torch.full_like(key_S, _NO_ROW)
    row_S[route_R] = torch.arange(route_R.shape[0], device=key_S.device)
    return DispatchPlan(route_R // slots, route_R, row_S.view_as(experts_TK), counts_E, routing.full)


def dispatch(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Copies each token to the rows of its experts; shape (R, D), sorted by expert."""
    x_RD: Tensor = _Dispatch.apply(x_TD, plan)  # type: ignore[no-untyped-call]
    return x_RD


def combine(y_RD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Sums each token's rows by their gate weights (Shazeer et al. 2017, eq. 1).

    Args:
        y_RD: The experts' results, in the order of `dispatch`.
        weights_TK: Weight of each slot.
        plan: As used for `dispatch`.

    Returns:
        Tensor of shape (T, D) in the dtype of the weights; zeros for tokens without experts.
    """
    y_TD: Tensor = _Combine.apply(y_RD, weights_TK, plan)  # type: ignore[no-untyped-call]
    return y_TD


def limit_to_capacity(routing: Routing, capacity: int) -> Routing:
    """Drops the routes that find their expert full; the token's other routes share their weight.

    An expert takes at most `capacity` tokens. First slots go before second ones, earlier tokens
    before later ones (GShard, arXiv 2006.16668, algorithm 1).
    """
    tokens, slots = routing.experts_TK.shape
    by_priority_S = routing.experts_TK.t().flatten()  # all first slots, then all second ones
    order_S = by_priority_S.argsort(stable=True)
    sorted_S = by_priority_S[order_S]
    first_S = torch.searchsorted(sorted_S, sorted_S)  # where the run of the same expert begins
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(len(order_S), device=order_S.device) - first_S
    return routing.keep((place_S < capacity).view(slots, tokens).t())


def _sum_rows(y_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None, full: bool) -> Tensor:
    """Sums rows into tokens, slot by slot; the one place where the order of summation is set."""
    dtype = torch.promote_types(y_RD.dtype, torch.float32)
    total_TD = y_RD.new_zeros(row_TK.shape[0], y_RD.shape[1], dtype=dtype)
    if not y_RD.shape[0]:
        return total_TD
    for slot, row_T in enumerate(row_TK.unbind(1)):
        picked_TD = y_RD.index_select(0, row_T if full else row_T.clamp_min(0))
        if not full:
            picked_TD.masked_fill_(row_T[:, None] == _NO_ROW, 0)
        if weights_TK is None:
            total_TD += picked_TD
        else:
            total_TD.addcmul_(picked_TD.to(dtype), weights_TK[:, slot, None])
    return total_TD


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return x_TD.index_select(0, plan.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_RD: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum_rows(g_RD, ctx.plan.row_TK, None, ctx.plan.full).to(g_RD.dtype), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y_RD, weights_TK)
        return _sum_rows(y_RD, plan.row_TK, weights_TK, plan.full).to(weights_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_RD, weights_TK = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        g_RD = g_TD.index_select(0, plan.token_R)
        grad_w_TK = torch.zeros_like(weights_TK)
        grad_w_TK.view(-1)[plan.route_R] = torch.linalg.vecdot(g_RD, y_RD.to(g_RD.dtype))
        weight_R1 = weights_TK.flatten()[plan.route_R, None]
        return (g_RD * weight_R1).to(y_RD.dtype), grad_w_TK, None
