from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_ray.gating import (
    NO_EXPERT,
    ExpertChoice,
    StrictlyBalanced,
    batchwise_loss,
    batchwise_mask,
    threshold_mask,
)


@settings(deadline=None)
@given(experts=st.sampled_from([2, 4, 8]), k=st.integers(1, 2), groups=st.integers(1, 6))
def test_in_training_every_expert_gets_exactly_its_share(experts: int, k: int, groups: int) -> None:
    gate = StrictlyBalanced(experts, k, d_model=4)
    tokens = experts * groups
    assert gate(torch.randn(tokens, 4)).counts().tolist() == [k * groups] * experts


def test_weights_are_masked_softmax_scores_normalised_over_the_tokens_experts() -> None:
    torch.manual_seed(0)
    gate = StrictlyBalanced(4, 2, d_model=3)
    x_TD = torch.randn(8, 3)
    routing = gate(x_TD)
    scores_TE = (x_TD @ gate.w_gate_DE).softmax(1)
    for t in range(8):
        chosen = [e for e in routing.experts_TK[t].tolist() if e != NO_EXPERT]
        expected = scores_TE[t, chosen] / scores_TE[t, chosen].sum()
        torch.testing.assert_close(routing.weights_TK[t, : len(chosen)], expected)


def test_in_eval_mode_a_tokens_experts_do_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    gate = StrictlyBalanced(4, 2, d_model=3).eval()
    torch.nn.init.normal_(gate.w_gate_DE)
    x_TD = torch.randn(8, 3)
    together = gate(x_TD)
    for t in range(8):
        alone = gate(x_TD[t : t + 1])
        width = alone.experts_TK.shape[1]
        assert torch.equal(together.experts_TK[t, :width], alone.experts_TK[0])


def test_threshold_loss_is_zero_exactly_where_both_masks_agree() -> None:
    scores_TE = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    agreeing_E, disagreeing_E = torch.tensor([0.5, 0.7]), torch.tensor([0.3, 0.7])
    assert torch.equal(threshold_mask(scores_TE, agreeing_E), batchwise_mask(scores_TE, 1))
    assert float(batchwise_loss(scores_TE, agreeing_E, 1)) == 0
    # One pair too many, 0.1 above its threshold.
    torch.testing.assert_close(batchwise_loss(scores_TE, disagreeing_E, 1), torch.tensor(0.1))


def test_threshold_gradient_is_the_number_of_tokens_too_few() -> None:
    scores_TE = torch.rand(20, 4, dtype=torch.float64)
    thresholds_E = torch.full((4,), 0.4, dtype=torch.float64, requires_grad=True)
    batchwise_loss(scores_TE, thresholds_E, 5).backward()
    assert thresholds_E.grad is not None
    torch.testing.assert_close(thresholds_E.grad, 5.0 - (scores_TE > 0.4).sum(0).double())

    def loss(t_E: torch.Tensor) -> torch.Tensor:
        return batchwise_loss(scores_TE, t_E, 5)

    assert torch.autograd.gradcheck(loss, thresholds_E)


def test_learned_thresholds_come_to_choose_as_the_batch_does() -> None:
    torch.manual_seed(0)
    gate = StrictlyBalanced(8, 2, d_model=6)
    torch.nn.init.normal_(gate.w_gate_DE)
    x_TD = torch.randn(512, 6)
    optimizer = torch.optim.Adam([gate.thresholds_E], lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        gate(x_TD).losses["threshold"].backward()
        optimizer.step()
    counts_E = gate.eval()(x_TD).counts()
    assert ((counts_E - 128).abs() <= 13).all(), counts_E  # within a tenth of the exact share


def test_expert_choice_takes_each_experts_best_tokens_with_their_plain_scores() -> None:
    torch.manual_seed(0)
    gate = ExpertChoice(4, 2, d_model=3)
    x_TD = torch.randn(10, 3)
    routing = gate(x_TD)
    scores_TE = (x_TD @ gate.w_gate_DE).softmax(1)
    dense_TE = torch.zeros(10, 5).scatter(1, routing.experts_TK % 5, routing.weights_TK)[:, :4]
    expected_TE = torch.zeros(10, 4)
    for e in range(4):
        best = scores_TE[:, e].sort(descending=True).indices[:5]
        expected_TE[best, e] = scores_TE[best, e]
    torch.testing.assert_close(dense_TE, expected_TE)
