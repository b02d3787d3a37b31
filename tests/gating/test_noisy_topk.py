from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moa_ray.gating import NoisyTopK, Routing


def random_gate(experts: int, k: int, d_model: int = 6, dtype: torch.dtype = torch.float32) -> NoisyTopK:
    gate = NoisyTopK(experts, k, d_model=d_model).to(dtype)
    torch.nn.init.normal_(gate.w_gate_DE)
    torch.nn.init.normal_(gate.w_noise_DE)
    return gate


def dense_weights(gate: NoisyTopK, x_TD: Tensor, seed: int) -> Tensor:
    """G(x) of eqs. 3-5 over all experts, written down as in the paper."""
    torch.manual_seed(seed)
    h_TE = x_TD @ gate.w_gate_DE
    if gate.training:
        noise_TE = torch.randn(h_TE.shape, dtype=h_TE.dtype)
        h_TE = h_TE + noise_TE * torch.log1p(torch.exp(x_TD @ gate.w_noise_DE))
    kth_T1 = h_TE.sort(dim=1, descending=True).values[:, gate.k - 1 : gate.k]
    return torch.where(h_TE >= kth_T1, h_TE, -torch.inf).softmax(1)


def scattered(gate: NoisyTopK, x_TD: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    routing: Routing = gate(x_TD)
    dense_TE = torch.zeros(len(x_TD), gate.num_experts, dtype=x_TD.dtype)
    return dense_TE.scatter(1, routing.experts_TK, routing.weights_TK)


@settings(deadline=None, max_examples=40)
@given(experts=st.integers(1, 10), data=st.data(), training=st.booleans(), seed=st.integers(0, 999))
def test_weights_and_gradients_equal_the_dense_reference(
    experts: int, data: st.DataObject, training: bool, seed: int
) -> None:
    k = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    gate = random_gate(experts, k, dtype=torch.float64).train(training)
    x_TD = torch.randn(5, 6, dtype=torch.float64)
    probe_TE = torch.randn(5, experts, dtype=torch.float64)
    results: list[tuple[Tensor, ...]] = []
    for weigh in (scattered, dense_weights):
        weights_TE = weigh(gate, x_TD, seed)
        grads = torch.autograd.grad(
            (weights_TE * probe_TE).sum(), list(gate.parameters()), allow_unused=True, materialize_grads=True
        )
        results.append((weights_TE, *grads))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


@given(experts=st.integers(1, 10), data=st.data())
@settings(deadline=None)
def test_each_token_gets_k_different_experts_and_weights_that_sum_to_one(experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts))
    routing = random_gate(experts, k)(torch.randn(9, 6))
    assert all(len(set(row)) == k for row in routing.experts_TK.tolist())
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(9))


def test_weights_start_at_zero_so_that_first_choices_are_noise_and_spread() -> None:
    torch.manual_seed(0)
    gate = NoisyTopK(8, 2, d_model=3)
    assert not gate.w_gate_DE.any() and not gate.w_noise_DE.any()
    counts_E = gate(torch.randn(4000, 3)).counts()
    # Each expert expects 1000 of 4000 tokens, with a standard deviation of 27.
    assert counts_E.min() > 880 and counts_E.max() < 1120


def test_eval_mode_has_no_noise_no_losses_and_counts_tokens_as_load() -> None:
    gate = random_gate(5, 2).eval()
    x_TD = torch.randn(20, 6)
    first, second = gate(x_TD), gate(x_TD)
    assert torch.equal(first.experts_TK, second.experts_TK) and torch.equal(first.weights_TK, second.weights_TK)
    assert torch.equal(first.load_E, first.counts().float())
    assert not first.losses


def test_training_draws_new_noise_at_every_call() -> None:
    gate = random_gate(5, 2)
    x_TD = torch.randn(20, 6)
    assert not torch.equal(gate(x_TD).weights_TK, gate(x_TD).weights_TK)


def test_with_k_equal_n_every_expert_is_loaded_with_every_token() -> None:
    routing = random_gate(4, 4)(torch.randn(11, 6))
    assert routing.load_E.tolist() == [11.0] * 4
    assert float(routing.losses["load"].detach()) == 0


def test_noise_that_underflows_to_zero_leaves_everything_finite() -> None:
    gate = NoisyTopK(4, 2, d_model=1)
    torch.nn.init.constant_(gate.w_noise_DE, -300.0)
    routing = gate(torch.ones(3, 1))
    (routing.losses["importance"] + routing.losses["load"]).backward()
    assert all(torch.isfinite(p.grad).all() for p in gate.parameters() if p.grad is not None)
    assert torch.isfinite(routing.load_E).all()


def test_gradients_of_losses_equal_finite_differences() -> None:
    torch.manual_seed(3)
    x_TD = torch.randn(6, 3, dtype=torch.float64)

    def loss(w_gate_DE: Tensor, w_noise_DE: Tensor) -> Tensor:
        torch.manual_seed(5)
        gate = NoisyTopK(5, 2, d_model=3, w_importance=0.3, w_load=0.7).double()
        routing: Routing = torch.func.functional_call(gate, {"w_gate_DE": w_gate_DE, "w_noise_DE": w_noise_DE}, (x_TD,))
        return routing.losses["importance"] + routing.losses["load"]

    weights = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(loss, weights, eps=1e-7, atol=1e-5)


def test_choices_are_made_in_float32_under_autocast_and_for_bfloat16_tokens() -> None:
    gate = random_gate(6, 2).eval()
    x_TD = torch.randn(30, 6).bfloat16()
    expected = gate(x_TD.float())
    with torch.autocast("cpu", torch.bfloat16):
        routing = gate(x_TD)
    assert routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.experts_TK, expected.experts_TK)


@pytest.mark.parametrize("permute", ["experts", "tokens"])
def test_permuting_experts_or_tokens_permutes_the_routing(permute: str) -> None:
    torch.manual_seed(0)
    gate = random_gate(7, 3).eval()
    x_TD = torch.randn(12, 6)
    dense_TE = scattered(gate, x_TD, 0)
    if permute == "tokens":
        order = torch.randperm(12)
        torch.testing.assert_close(scattered(gate, x_TD[order], 0), dense_TE[order])
    else:
        order = torch.randperm(7)
        gate.w_gate_DE.data = gate.w_gate_DE.data[:, order]
        torch.testing.assert_close(scattered(gate, x_TD, 0), dense_TE[:, order])
