"""What every gate must do, and what it must refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moa_ray.errors import SpecError
from moa_ray.gating import (
    NO_EXPERT,
    ExpertChoice,
    Gate,
    GateError,
    Hierarchical,
    LossFreeBias,
    NoisyTopK,
    SoftmaxTopK,
    StrictlyBalanced,
)

GATES: dict[str, Callable[[], Gate]] = {
    "noisy_top_k": lambda: NoisyTopK(8, 2),
    "hierarchical": lambda: Hierarchical(4, 2, k_groups=2, k_experts=1),
    "strictly_balanced": lambda: StrictlyBalanced(8, 2),
    "expert_choice": lambda: ExpertChoice(8, 2),
    "softmax_top_k": lambda: SoftmaxTopK(8, 2),
    "loss_free": lambda: LossFreeBias(8, 2),
}


@pytest.fixture(params=list(GATES))
def gate(request: pytest.FixtureRequest) -> Gate:
    torch.manual_seed(0)
    return GATES[request.param]()


@pytest.mark.parametrize("training", [True, False])
def test_routing_is_a_consistent_table_of_slots(gate: Gate, training: bool) -> None:
    gate.materialize(5)
    routing = gate.train(training)(torch.randn(16, 5))
    filled_TK = routing.experts_TK != NO_EXPERT
    assert routing.num_experts == 8
    assert routing.experts_TK.shape == routing.weights_TK.shape
    assert routing.experts_TK.dtype == torch.int64
    assert routing.experts_TK.max() < 8
    assert (routing.weights_TK[~filled_TK] == 0).all()
    assert not (routing.full and not filled_TK.all())
    assert int(routing.counts().sum()) == int(filled_TK.sum())
    importance_E = torch.zeros(8)
    importance_E.index_add_(0, routing.experts_TK[filled_TK], routing.weights_TK[filled_TK])
    torch.testing.assert_close(routing.importance_E, importance_E)


def test_weights_have_gradients_in_the_gate(gate: Gate) -> None:
    gate.materialize(5)
    routing = gate(torch.randn(16, 5))
    (routing.weights_TK * torch.randn(routing.weights_TK.shape)).sum().backward()
    grads = [p.grad for p in gate.parameters() if p.grad is not None]
    assert any(bool(g.abs().max() > 0) for g in grads)


def test_a_gate_without_width_says_so(gate: Gate) -> None:
    with pytest.raises(GateError, match="does not know its width"):
        gate(torch.randn(3, 5))


def test_a_gate_keeps_its_first_width(gate: Gate) -> None:
    gate.materialize(5)
    weights = [p.clone() for p in gate.parameters()]
    gate.materialize(5)
    assert all(torch.equal(a, b) for a, b in zip(weights, gate.parameters(), strict=True))
    with pytest.raises(GateError, match="d_model=5, the layer 6"):
        gate.materialize(6)


@pytest.mark.parametrize(
    ("x", "complaint"),
    [
        (torch.randn(3, 4), r"shape \(3, 4\), expected \(tokens, 5\)"),
        (torch.randn(5), r"shape \(5,\)"),
        (torch.randn(0, 5), "empty"),
        (torch.ones(3, 5, dtype=torch.int64), "dtype torch.int64"),
    ],
)
def test_wrong_input_is_refused_by_name(gate: Gate, x: torch.Tensor, complaint: str) -> None:
    gate.materialize(5)
    with pytest.raises(GateError, match=complaint):
        gate(x)


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_of_the_experts_is_refused(k: int) -> None:
    with pytest.raises(GateError, match=f"k={k} experts"):
        NoisyTopK(4, k)


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(GateError, match="d_model=0 is not a width"):
        NoisyTopK(4, 2, d_model=0)


def test_a_gate_shows_its_sizes() -> None:
    assert repr(NoisyTopK(4, 2, d_model=3)) == "NoisyTopK(num_experts=4, k=2, d_model=3)"


def test_a_gate_error_is_both_a_moa_ray_error_and_a_value_error() -> None:
    assert issubclass(GateError, SpecError) and issubclass(GateError, ValueError)


def test_keep_shares_a_tokens_weight_among_the_slots_left() -> None:
    gate = SoftmaxTopK(4, 2, d_model=3)
    routing = gate(torch.randn(2, 3))
    kept = routing.keep(torch.tensor([[True, False], [False, False]]))
    assert kept.experts_TK[0].tolist() == [int(routing.experts_TK[0, 0]), NO_EXPERT]
    torch.testing.assert_close(kept.weights_TK[0], torch.tensor([1.0, 0.0]))
    assert kept.experts_TK[1].tolist() == [NO_EXPERT] * 2 and not kept.weights_TK[1].any()
    assert not kept.full
