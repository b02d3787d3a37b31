"""The experts: a protocol that any placement of them follows, and those in this process.

Shape suffixes: see `grouped.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moa_ray.gating import GateError
from moa_ray.moe.grouped import grouped_linear

Activation = Literal["relu", "swiglu"]


@runtime_checkable
class Experts(Protocol):
    """What the `MoE` layer asks of experts, wherever they run.

    A call takes the rows of all experts, sorted by expert (R, D), and the rows of each, int64 (E,);
    it returns their results in the same order. Experts that are modules with parameters train
    with the layer; others must be differentiable through autograd by themselves.
    """

    num_experts: int
    d_model: int

    def __call__(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Runs every expert on its own rows."""
        ...


@runtime_checkable
class RemoteExperts(Experts, Protocol):
    """Experts that may be gone for a while: a call then raises `ExpertsLost`, and the layer masks them."""

    def living(self) -> Tensor | None:
        """Which experts can be asked now, bool of shape (E,); None for all."""
        ...


class LocalExperts(nn.Module):
    """Feed-forward experts in this process: the reference that every other placement must equal.

    Each has one hidden layer and no biases, as in Shazeer et al. 2017, appendix C.1: ReLU(x W_in) W_out,
    or SwiGLU as in Mixtral: (SiLU(x W_a) * (x W_b)) W_out with W_in = [W_a W_b].

    Args:
        num_experts: E.
        d_model: D, width of tokens.
        d_hidden: H, width of an expert's hidden layer.
        activation: `relu` or `swiglu`.
        recompute: Whether to compute the hidden layer again in the backward pass instead of
            keeping it (appendix D): R * H floats less memory for one more forward pass.

    Raises:
        GateError: A size below 1, or an unknown activation.
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_hidden: int,
        *,
        activation: Activation = "relu",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(num_experts, d_model, d_hidden, activation)
        self.num_experts = num_experts
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.activation = activation
        self.recompute = recompute
        d_in = 2 * d_hidden if activation == "swiglu" else d_hidden
        self.w_in_EDH = nn.Parameter(torch.randn(num_experts, d_model, d_in) * d_model**-0.5)
        self.w_out_EHD = nn.Parameter(torch.randn(num_experts, d_hidden, d_model) * d_hidden**-0.5)

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Runs every expert on its own rows.

        Args:
            x_RD: Rows sorted by expert.
            counts_E: Rows of each expert, int64.

        Returns:
            Tensor of shape (R, D), in the autocast dtype where autocast is on.
        """
        if torch.is_autocast_enabled(x_RD.device.type):
            x_RD = x_RD.to(torch.get_autocast_dtype(x_RD.device.type))
        if self.recompute and torch.is_grad_enabled():
            y_RD: Tensor = checkpoint(self._run, x_RD, counts_E, use_reentrant=False, preserve_rng_state=False)
            return y_RD
        return self._run(x_RD, counts_E)

    def _run(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        weights = (self.w_in_EDH.to(x_RD.dtype), self.w_out_EHD.to(x_RD.dtype))
        return feed_forward(x_RD, *weights, counts_E, self.activation)

    def extra_repr(self) -> str:
        """Shows the sizes in `print(module)`."""
        return f"{self.num_experts}, {self.d_model}, {self.d_hidden}, activation={self.activation!r}"


def check_sizes(num_experts: int, d_model: int, d_hidden: int, activation: str) -> None:
    """Refuses experts that cannot be.

    Raises:
        GateError: A size below 1, or an unknown activation.
    """
    if min(num_experts, d_model, d_hidden) < 1:
        raise GateError(f"experts need sizes above 0, not {num_experts=}, {d_model=}, {d_hidden=}")
    if activation not in _HIDDEN:
        raise GateError(f"unknown activation {activation!r}", hint=f"one of {', '.join(_HIDDEN)}")


def feed_forward(x_RD: Tensor, w_in_EDH: Tensor, w_out_EHD: Tensor, counts_E: Tensor, activation: Activation) -> Tensor:
    """What `LocalExperts` compute, from their weights."""
    hidden_RH = _HIDDEN[activation](grouped_linear(x_RD, w_in_EDH, counts_E))
    return grouped_linear(hidden_RH, w_out_EHD, counts_E)


class FeedForward(nn.Module):
    """One expert that every token goes to: a layer's shared experts (DeepSeekMoE), or a dense control.

    Args:
        d_model: D, width of tokens.
        d_hidden: Width of the hidden layer; s shared experts of width H are one of width s * H.
        activation: `relu` or `swiglu`.
    """

    def __init__(self, d_model: int, d_hidden: int, *, activation: Activation = "relu") -> None:
        super().__init__()
        self.expert = LocalExperts(1, d_model, d_hidden, activation=activation)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Maps tokens of shape (..., D) to the same shape."""
        hidden_TH = _HIDDEN[self.expert.activation](x_TD @ self.expert.w_in_EDH[0])
        return hidden_TH @ self.expert.w_out_EHD[0]


def _swiglu(a_RH: Tensor) -> Tensor:
    gate_RH, up_RH = a_RH.chunk(2, dim=-1)
    return F.silu(gate_RH) * up_RH


_HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "swiglu": _swiglu}
