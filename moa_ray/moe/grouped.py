"""One matrix product per expert over tokens sorted by expert.

Shape suffixes used in this room:
    T tokens   D model width   E experts   K slots of a token   H hidden width of an expert
    R routes: one row per (token, expert) pair, sorted by expert

On CPU `torch.nn.functional.grouped_mm` is level with or ahead of a padded batched product and a
loop in Python at every size measured (benchmarks/RESULTS.md), so there is no third way here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_ALIGN_BYTES = 16  # what grouped_mm asks of row strides
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(x_RD: Tensor, w_EDH: Tensor, counts_E: Tensor) -> Tensor:
    """Multiplies each expert's rows by its own matrix.

    A row's result depends on the rows of its own expert alone, so experts that are spread over
    workers give the same bits.

    Args:
        x_RD: Rows sorted by expert.
        w_EDH: A matrix per expert.
        counts_E: Rows of each expert, int64, summing to R.

    Returns:
        Tensor of shape (R, H).
    """
    if not x_RD.shape[0]:  # keeps the graph, so that weights get a gradient of zeros
        return x_RD @ w_EDH[0]
    aligned = all(size * x_RD.element_size() % _ALIGN_BYTES == 0 for size in w_EDH.shape[1:])
    if aligned and x_RD.dtype in _GROUPED_DTYPES:
        ends_E = counts_E.cumsum(0).to(torch.int32)
        y_RH: Tensor = _GroupedMM.apply(x_RD.contiguous(), w_EDH.contiguous(), ends_E)  # type: ignore[no-untyped-call]
        return y_RH
    return loop_linear(x_RD, w_EDH, counts_E)


def loop_linear(x_RD: Tensor, w_EDH: Tensor, counts_E: Tensor) -> Tensor:
    """The same as `grouped_linear` in a loop: for float64 and odd widths, and the oracle of tests."""
    rows = x_RD.split(counts_E.tolist())
    return torch.cat([x_ND @ w_DH for x_ND, w_DH in zip(rows, w_EDH.unbind(0), strict=True)])


class _GroupedMM(torch.autograd.Function):
    """`grouped_mm` whose backward accepts any gradient; torch's own refuses expanded or unaligned ones."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, w_EDH: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RD, w_EDH, ends_E)
        return F.grouped_mm(x_RD, w_EDH, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_RH: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_RD, w_EDH, ends_E = ctx.saved_tensors
        g_RH = g_RH.contiguous()
        need_x, need_w, _ = ctx.needs_input_grad
        grad_x = F.grouped_mm(g_RH, w_EDH.transpose(1, 2), offs=ends_E) if need_x else None
        grad_w = F.grouped_mm(x_RD.t(), g_RH, offs=ends_E) if need_w else None
        return grad_x, grad_w, None
