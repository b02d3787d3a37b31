"""Remote experts under autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa_ray.moe.remote.caller import Caller


class RemoteCall:
    """A caller as a differentiable function of the rows; weights get their gradients in their shards.

    Args:
        caller: Sends the rows.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        # Makes autograd come back to the experts even where the rows need no gradient.
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Runs every expert on its own rows."""
        if not torch.is_grad_enabled():
            return self._caller.forward(x_RD, counts_E)
        y_RD: Tensor = _Remote.apply(x_RD, counts_E, self._caller, self._anchor)  # type: ignore[no-untyped-call]
        return y_RD


class _Remote(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, counts_E: Tensor, caller: Caller, anchor: Tensor) -> Tensor:
        ctx.caller, ctx.call = caller, caller.name_call()
        ctx.save_for_backward(x_RD, counts_E)
        return caller.forward(x_RD, counts_E, ctx.call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_RD: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_RD, counts_E = ctx.saved_tensors
        return ctx.caller.backward(ctx.call, x_RD, counts_E, g_RD), None, None, None
