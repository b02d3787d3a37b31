from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moa_ray.moe.grouped import grouped_linear, loop_linear

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(linear: Linear, x_RD: Tensor, w_EDH: Tensor, counts_E: Tensor, g_RH: Tensor) -> list[Tensor]:
    x_RD, w_EDH = x_RD.clone().requires_grad_(), w_EDH.clone().requires_grad_()
    y_RH = linear(x_RD, w_EDH, counts_E)
    y_RH.backward(g_RH)
    assert x_RD.grad is not None and w_EDH.grad is not None
    return [y_RH.detach(), x_RD.grad, w_EDH.grad]


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    sizes=st.sampled_from([(8, 4), (4, 16), (5, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_grouped_product_equals_the_loop_forward_and_backward(
    counts: list[int], sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows, (d, h) = sum(counts), sizes
    x, w, g = (torch.randn(*s, dtype=dtype) for s in ((rows, d), (len(counts), d, h), (rows, h)))
    ours, oracle = (run(f, x, w, torch.tensor(counts), g) for f in (grouped_linear, loop_linear))
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_expert_without_rows_gets_a_gradient_of_zeros() -> None:
    counts_E = torch.tensor([3, 0, 2])
    _, _, grad_w = run(grouped_linear, torch.randn(5, 8), torch.randn(3, 8, 4), counts_E, torch.randn(5, 4))
    assert not grad_w[1].any() and grad_w[0].any()


def test_no_rows_at_all_gives_no_rows_and_gradients_of_zeros() -> None:
    w_EDH = torch.randn(3, 8, 4, requires_grad=True)
    y_RH = grouped_linear(torch.randn(0, 8), w_EDH, torch.zeros(3, dtype=torch.int64))
    y_RH.sum().backward()
    assert y_RH.shape == (0, 4)
    assert w_EDH.grad is not None and not w_EDH.grad.any()


def test_a_gradient_that_is_an_expanded_view_is_accepted() -> None:
    x_RD, w_EDH = torch.randn(4, 8), torch.randn(2, 8, 4, requires_grad=True)
    grouped_linear(x_RD, w_EDH, torch.tensor([1, 3])).sum().backward()
    assert w_EDH.grad is not None
    torch.testing.assert_close(w_EDH.grad[0], x_RD[0, :, None].expand(8, 4))


@pytest.mark.parametrize("shards", [2, 3, 6])
def test_experts_in_shards_give_the_same_bits_as_all_at_once(shards: int) -> None:
    """What lets experts live elsewhere: an expert's result depends on its own rows alone."""
    torch.manual_seed(0)
    counts_E = torch.tensor([7, 0, 12, 1, 30, 5])
    x, w, g = torch.randn(55, 16), torch.randn(6, 16, 32), torch.randn(55, 32)
    whole = run(grouped_linear, x, w, counts_E, g)
    parts: list[list[Tensor]] = []
    for own in torch.arange(6).chunk(shards):
        begin, rows = int(counts_E[: own[0]].sum()), int(counts_E[own].sum())
        here = slice(begin, begin + rows)
        parts.append(run(grouped_linear, x[here], w[own], counts_E[own], g[here]))
    for i in range(3):
        assert torch.equal(torch.cat([p[i] for p in parts]), whole[i])
