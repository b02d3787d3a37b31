from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moa_ray.gating import NO_EXPERT, Routing
from moa_ray.moe.dispatch import combine, dispatch, limit_to_capacity, plan_dispatch


def routing_of(table: list[list[int]], experts: int, dtype: torch.dtype = torch.float32) -> Routing:
    """A routing with given experts and random weights that sum to 1 over the filled slots."""
    experts_TK = torch.tensor(table)
    weights_TK = torch.rand(experts_TK.shape, dtype=dtype).masked_fill(experts_TK == NO_EXPERT, 0)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp_min(1e-6)
    zeros_E = torch.zeros(experts, dtype=dtype)
    return Routing(experts_TK, weights_TK, zeros_E, zeros_E, full=bool((experts_TK != NO_EXPERT).all()))


@st.composite
def tables(draw: st.DrawFn, experts: int = 5) -> list[list[int]]:
    slots = draw(st.integers(1, 3))
    row = st.permutations(range(experts)).map(lambda p: list(p[:slots]))
    rows = draw(st.lists(row, min_size=1, max_size=8))
    return [[NO_EXPERT if draw(st.integers(0, 4)) == 0 else e for e in r] for r in rows]


@settings(deadline=None)
@given(tables())
def test_rows_are_sorted_by_expert_and_then_by_token(table: list[list[int]]) -> None:
    x_TD = torch.arange(len(table), dtype=torch.float32)[:, None]
    plan = plan_dispatch(routing_of(table, 5))
    expected = sorted((e, t) for t, row in enumerate(table) for e in row if e != NO_EXPERT)
    assert dispatch(x_TD, plan)[:, 0].tolist() == [t for _, t in expected]
    assert plan.counts_E.tolist() == [sum(e == i for e, _ in expected) for i in range(5)]


@settings(deadline=None)
@given(tables())
def test_combine_is_the_weighted_sum_of_the_tokens_rows_and_so_are_gradients(table: list[list[int]]) -> None:
    torch.manual_seed(0)
    routing = routing_of(table, 5, torch.float64)
    x_TD = torch.randn(len(table), 3, dtype=torch.float64, requires_grad=True)
    weights_TK = routing.weights_TK.clone().requires_grad_()
    scale_E = torch.randn(5, dtype=torch.float64)
    plan = plan_dispatch(routing)
    row_scale_R1 = scale_E.repeat_interleave(plan.counts_E)[:, None]
    y_TD = combine(dispatch(x_TD, plan) * row_scale_R1, weights_TK, plan)

    slot_scale_TK = torch.where(routing.experts_TK >= 0, scale_E[routing.experts_TK.clamp_min(0)], 0)
    expected_TD = (weights_TK * slot_scale_TK).sum(1, keepdim=True) * x_TD
    torch.testing.assert_close(y_TD, expected_TD)
    probe_TD = torch.randn_like(y_TD)
    ours = torch.autograd.grad(y_TD, (x_TD, weights_TK), probe_TD)
    reference = torch.autograd.grad(expected_TD, (x_TD, weights_TK), probe_TD)
    torch.testing.assert_close(ours, reference)


def test_a_value_that_is_not_finite_stays_with_its_own_token() -> None:
    routing = routing_of([[0, 1], [NO_EXPERT, 2]], 3)
    plan = plan_dispatch(routing)
    y_RD = torch.tensor([[torch.inf], [1.0], [2.0]])
    y_TD = combine(y_RD, routing.weights_TK, plan)
    assert torch.isinf(y_TD[0]) and float(y_TD[1]) == 2.0


def test_sums_of_bfloat16_rows_are_kept_in_float32() -> None:
    routing = routing_of([[0, 1, 2]], 3)
    plan = plan_dispatch(routing)
    y_RD = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()
    assert float(combine(y_RD, torch.ones(1, 3), plan)) == 258.0  # bfloat16 has no 257


def survivors(table: list[list[int]], experts: int, capacity: int) -> Tensor:
    return limit_to_capacity(routing_of(table, experts), capacity).experts_TK


def test_over_capacity_first_slots_go_before_second_and_early_tokens_before_late() -> None:
    table = [[1, 0], [0, 1], [0, 1], [0, 2]]
    assert survivors(table, 3, 2).tolist() == [[1, -1], [0, 1], [0, -1], [-1, 2]]


@settings(deadline=None)
@given(tables(), st.integers(1, 4))
def test_no_expert_exceeds_capacity_and_none_drops_a_token_it_has_room_for(
    table: list[list[int]], capacity: int
) -> None:
    routing = routing_of(table, 5)
    wanted_E, kept_E = routing.counts(), limit_to_capacity(routing, capacity).counts()
    assert torch.equal(kept_E, wanted_E.clamp_max(capacity))
