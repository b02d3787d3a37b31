from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moa_ray.gating import GateError
from moa_ray.moe import Experts, FeedForward, LocalExperts
from moa_ray.moe.experts import Activation


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_each_expert_is_its_own_feed_forward_network(activation: Activation) -> None:
    torch.manual_seed(0)
    experts = LocalExperts(3, 8, 4, activation=activation)
    x_RD, counts = torch.randn(9, 8), [4, 0, 5]
    y_RD = experts(x_RD, torch.tensor(counts))
    for e, (rows, result) in enumerate(zip(x_RD.split(counts), y_RD.split(counts), strict=True)):
        a = rows @ experts.w_in_EDH[e]
        hidden = a.relu() if activation == "relu" else F.silu(a[:, :4]) * a[:, 4:]
        torch.testing.assert_close(result, hidden @ experts.w_out_EHD[e])


def test_recomputing_gives_the_same_bits_and_keeps_less() -> None:
    def run(recompute: bool) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        experts = LocalExperts(4, 16, 256, recompute=recompute)
        x_RD = torch.randn(40, 16, requires_grad=True)
        kept: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y_RD = experts(x_RD, torch.tensor([10, 5, 20, 5]))
        y_RD.square().sum().backward()
        grads = [p.grad for p in (x_RD, *experts.parameters()) if p.grad is not None]
        return [y_RD, *grads], max(kept, default=0)

    (plain, plain_kept), (again, again_kept) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(plain) == 4
    assert again_kept < 40 * 256 <= plain_kept


def test_autocast_computes_in_bfloat16_and_gives_float32_gradients() -> None:
    experts = LocalExperts(2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y_RD = experts(torch.randn(6, 8), torch.tensor([2, 4]))
    y_RD.sum().backward()
    assert y_RD.dtype == torch.bfloat16
    assert experts.w_in_EDH.grad is not None and experts.w_in_EDH.grad.dtype == torch.float32


def test_local_experts_follow_the_protocol() -> None:
    assert isinstance(LocalExperts(2, 4, 4), Experts)


def test_feed_forward_is_one_expert_that_takes_every_token() -> None:
    dense = FeedForward(8, 4, activation="swiglu")
    one = LocalExperts(1, 8, 4, activation="swiglu")
    one.load_state_dict(dense.expert.state_dict())
    x_TD = torch.randn(5, 8)
    torch.testing.assert_close(dense(x_TD), one(x_TD, torch.tensor([5])))


def test_wrong_sizes_and_activations_are_refused() -> None:
    with pytest.raises(GateError, match="sizes above 0"):
        LocalExperts(0, 4, 4)
    with pytest.raises(GateError, match="unknown activation 'gelu'"):
        LocalExperts(2, 4, 4, activation="gelu")  # type: ignore[arg-type]
