from __future__ import annotations

import pytest
import torch

from moa_ray.gating import GateError, Hierarchical, NoisyTopK


def random_gate(groups: int = 4, size: int = 3, k_groups: int = 2, k_experts: int = 2) -> Hierarchical:
    gate = Hierarchical(groups, size, k_groups=k_groups, k_experts=k_experts, d_model=5)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return gate


def test_weights_are_the_product_of_both_levels_in_eval_mode() -> None:
    torch.manual_seed(0)
    gate = random_gate().eval()
    x_TD = torch.randn(20, 5)
    routing = gate(x_TD)
    dense_TE = torch.zeros(20, 12).scatter(1, routing.experts_TK, routing.weights_TK)

    def level(level_gate: torch.nn.Module) -> torch.Tensor:
        assert isinstance(level_gate, NoisyTopK)
        out = level_gate(x_TD)
        return torch.zeros(20, level_gate.num_experts).scatter(1, out.experts_TK, out.weights_TK)

    primary_TG = level(gate.primary)
    expected_TE = torch.cat([primary_TG[:, g, None] * level(s) for g, s in enumerate(gate.secondary)], dim=1)
    torch.testing.assert_close(dense_TE, expected_TE)
    torch.testing.assert_close(routing.importance_E, expected_TE.sum(0))


def test_load_is_the_primary_load_spread_as_the_groups_own_tokens_are() -> None:
    torch.manual_seed(0)
    gate = random_gate()
    x_TD = torch.randn(30, 5)
    torch.manual_seed(1)
    routing = gate(x_TD)
    torch.manual_seed(1)
    primary = gate.primary(x_TD)
    expected: list[torch.Tensor] = []
    for group, secondary in enumerate(gate.secondary):
        own_ND = x_TD[(primary.experts_TK == group).any(1)]
        expected.append(primary.load_E[group] * secondary(own_ND).load_E / len(own_ND))
    torch.testing.assert_close(routing.load_E, torch.cat(expected))


def test_the_load_loss_reaches_the_primary_gate() -> None:
    torch.manual_seed(0)
    gate = random_gate()
    gate(torch.randn(30, 5)).losses["load"].backward()
    grad = gate.primary.w_gate_DE.grad
    assert grad is not None and grad.abs().max() > 0


def test_a_group_without_tokens_has_no_load() -> None:
    torch.manual_seed(0)
    gate = random_gate(k_groups=1).eval()
    routing = gate(torch.randn(1, 5))
    assert int((routing.load_E.view(4, 3).sum(1) > 0).sum()) == 1


def test_with_one_group_it_is_the_flat_gate_of_that_group() -> None:
    torch.manual_seed(0)
    gate = random_gate(groups=1, size=6, k_groups=1).eval()
    x_TD = torch.randn(9, 5)
    flat = gate.secondary[0](x_TD)
    routing = gate(x_TD)
    assert torch.equal(routing.experts_TK, flat.experts_TK)
    torch.testing.assert_close(routing.weights_TK, flat.weights_TK)


@pytest.mark.parametrize(("k_groups", "k_experts"), [(5, 1), (1, 4), (0, 1), (1, 0), (13, 1)])
def test_a_level_that_chooses_more_than_it_has_is_refused(k_groups: int, k_experts: int) -> None:
    complaint = f"k_groups={k_groups} cannot be chosen from num_groups=4, or k_experts={k_experts} from group_size=3"
    with pytest.raises(GateError, match=complaint):
        Hierarchical(4, 3, k_groups=k_groups, k_experts=k_experts)
