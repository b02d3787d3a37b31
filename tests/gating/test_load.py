"""The load estimator against its definition in the paper, by Monte Carlo."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moa_ray.gating import NoisyTopK, kth_excluding, load_probability

DRAWS = 20_000


def chance_of_being_chosen(clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, k: int) -> Tensor:
    """P(x, i) counted: the noise on expert i alone is drawn anew, then the top k are taken."""
    tokens, experts = clean_TE.shape
    chosen_TE = torch.zeros(tokens, experts)
    for i in range(experts):
        h_NTE = noisy_TE.repeat(DRAWS, 1, 1)
        h_NTE[:, :, i] = clean_TE[:, i] + torch.randn(DRAWS, tokens) * std_TE[:, i]
        chosen_TE[:, i] = (h_NTE.topk(k, dim=2).indices == i).any(2).float().mean(0)
    return chosen_TE


# The seed follows from the shape: at four standard errors, fresh draws of the noise at every run would fail once in a
# hundred runs. All 216 shapes pass.
@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(1, 6), experts=st.integers(2, 9), data=st.data())
def test_load_of_every_expert_is_within_four_standard_errors_of_monte_carlo(
    tokens: int, experts: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, experts - 1), label="k")
    torch.manual_seed(100 * tokens + 10 * experts + k)
    clean_TE, std_TE = torch.randn(tokens, experts), torch.rand(tokens, experts) + 0.1
    noisy_TE = clean_TE + torch.randn(tokens, experts) * std_TE

    p_TE = load_probability(clean_TE, std_TE, *noisy_TE.topk(k + 1, dim=1))
    counted_TE = chance_of_being_chosen(clean_TE, noisy_TE, std_TE, k)

    # The error of a frequency, at least that of one draw, so that a chance near 0 or 1 has some room.
    variance_TE = (p_TE * (1 - p_TE)).clamp_min(1 / DRAWS) / DRAWS
    error_E, standard_error_E = (p_TE - counted_TE).sum(0).abs(), variance_TE.sum(0).sqrt()
    assert (error_E <= 4 * standard_error_E).all()


def test_the_gates_own_load_is_the_estimator_of_the_noise_it_drew() -> None:
    torch.manual_seed(0)
    gate = NoisyTopK(6, 2, d_model=5)
    torch.nn.init.normal_(gate.w_gate_DE)
    torch.nn.init.normal_(gate.w_noise_DE)
    x_TD = torch.randn(7, 5)
    torch.manual_seed(1)
    load_E = gate(x_TD).load_E
    torch.manual_seed(1)
    clean_TE = x_TD @ gate.w_gate_DE
    std_TE = torch.nn.functional.softplus(x_TD @ gate.w_noise_DE)
    noisy_TE = clean_TE + torch.randn(7, 6) * std_TE
    expected_E = chance_of_being_chosen(clean_TE, noisy_TE, std_TE, 2).sum(0)
    assert (load_E - expected_E).abs().max() < 4 * (7 * 0.25 / DRAWS) ** 0.5


@given(experts=st.integers(2, 8), data=st.data())
def test_kth_excluding_leaves_out_exactly_the_component_itself(experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts - 1))
    h_TE = torch.randn(4, experts, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    found_TE = kth_excluding(*h_TE.topk(k + 1, dim=1), experts)
    for t in range(4):
        for i in range(experts):
            others = sorted((float(h_TE[t, j]) for j in range(experts) if j != i), reverse=True)
            assert float(found_TE[t, i]) == others[k - 1]


def test_kth_excluding_holds_for_tied_logits() -> None:
    top, index = torch.tensor([[2.0, 2.0, 1.0]]).topk(2, dim=1)
    assert kth_excluding(top, index, 3).tolist() == [[2.0, 2.0, 2.0]]


def test_load_has_gradients_although_all_weights_are_zero() -> None:
    torch.manual_seed(0)
    gate = NoisyTopK(8, 2, d_model=4, w_importance=0, w_load=1)
    gate(torch.randn(16, 4)).losses["load"].backward()
    assert gate.w_gate_DE.grad is not None and gate.w_gate_DE.grad.abs().max() > 0
