from __future__ import annotations

import torch
from torch.nn import functional as F

from moa_ray.moe.sampled_softmax import log_uniform, sampled_softmax_loss


def test_sampling_probabilities_sum_to_one_and_fall() -> None:
    q_V = log_uniform(50)
    torch.testing.assert_close(q_V.sum(), torch.tensor(1.0))
    assert (q_V.diff() < 0).all()


def test_with_many_samples_loss_and_gradient_approach_the_full_softmax() -> None:
    torch.manual_seed(0)
    layer, x_TD, targets_T = torch.nn.Linear(6, 30), torch.randn(9, 6), torch.randint(30, (9,))
    full = F.cross_entropy(layer(x_TD), targets_T)
    sampled = sampled_softmax_loss(x_TD, targets_T, layer, 200_000)
    torch.testing.assert_close(sampled, full, rtol=0.01, atol=0.01)
    grads = [torch.autograd.grad(loss, layer.weight)[0] for loss in (sampled, full)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0.05, atol=0.005)


def test_the_estimated_normaliser_is_unbiased() -> None:
    torch.manual_seed(0)
    layer, x_TD, target_T = torch.nn.Linear(4, 20), torch.randn(1, 4), torch.tensor([3])
    target_logit = layer(x_TD)[0, 3]
    with torch.no_grad():
        draws = torch.stack([sampled_softmax_loss(x_TD, target_T, layer, 5) for _ in range(4000)])
        estimates = (draws + target_logit).exp()
        expected = layer(x_TD).exp().sum()
    assert abs(estimates.mean() - expected) < 4 * estimates.std() / 4000**0.5


def test_drawing_the_target_itself_does_not_count_it_twice() -> None:
    layer = torch.nn.Linear(4, 1)  # the target is the only word: its probability is 1
    loss = sampled_softmax_loss(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), layer, 7)
    assert float(loss.detach()) == 0


def test_only_target_and_sampled_rows_get_a_gradient() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1000)
    sampled_softmax_loss(torch.randn(2, 4), torch.tensor([7, 9]), layer, 5).backward()
    assert layer.weight.grad is not None
    assert int(layer.weight.grad.any(1).sum()) <= 7
