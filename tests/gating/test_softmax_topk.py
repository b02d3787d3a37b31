from __future__ import annotations

import torch

from moa_ray.gating import LossFreeBias, SoftmaxTopK


def test_renormalised_softmax_is_a_softmax_over_the_chosen_logits() -> None:
    gate = SoftmaxTopK(6, 3, d_model=4)
    torch.nn.init.normal_(gate.w_gate_DE)
    x_TD = torch.randn(10, 4)
    routing = gate(x_TD)
    expected_TK = (x_TD @ gate.w_gate_DE).topk(3, dim=1).values.softmax(1)
    torch.testing.assert_close(routing.weights_TK, expected_TK)


def test_the_bias_changes_who_is_chosen_but_not_the_weights() -> None:
    torch.manual_seed(0)
    gate = LossFreeBias(4, 2, d_model=3)
    x_TD = torch.randn(10, 3)
    gate.bias_E += torch.tensor([9.0, 0, 0, 9.0])
    routing = gate(x_TD)
    scores_TE = (x_TD @ gate.w_gate_DE).sigmoid()
    assert set(routing.experts_TK.flatten().tolist()) == {0, 3}
    chosen_TK = scores_TE.gather(1, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, chosen_TK / chosen_TK.sum(1, keepdim=True))


def test_end_step_moves_each_bias_one_step_towards_the_mean_load() -> None:
    gate = LossFreeBias(3, 1, d_model=1, update_rate=0.01)
    gate.w_gate_DE.data = torch.tensor([[5.0, 0.0, -5.0]])
    gate(torch.ones(6, 1))
    gate.end_step()
    torch.testing.assert_close(gate.bias_E, torch.tensor([-0.01, 0.01, 0.01]))
    gate.end_step()  # no tokens since: all at the mean, nothing moves
    torch.testing.assert_close(gate.bias_E, torch.tensor([-0.01, 0.01, 0.01]))


def test_eval_mode_does_not_count() -> None:
    gate = LossFreeBias(3, 1, d_model=2).eval()
    gate(torch.randn(6, 2))
    assert not gate.counts_E.any()


def test_the_bias_balances_a_gate_that_prefers_one_expert() -> None:
    torch.manual_seed(0)
    gate = LossFreeBias(8, 2, d_model=4, update_rate=0.02)
    torch.nn.init.normal_(gate.w_gate_DE)
    x_TD = torch.randn(1024, 4) + 0.5
    before = gate(x_TD).counts()
    for _ in range(200):
        gate(x_TD)
        gate.end_step()
    after = gate(x_TD).counts()
    assert before.max() / before.float().mean() > 1.5
    assert after.max() / after.float().mean() < 1.15
