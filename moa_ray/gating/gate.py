"""The interface of all gates: a module that maps token vectors to a `Routing`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moa_ray.gating.errors import GateError
from moa_ray.gating.routing import Routing

ROUTER_INIT_STD = 0.02
"""Standard deviation of the first weights of gates without noise, which zeros would leave all tied."""


class Gate(nn.Module, ABC):
    """Chooses experts for tokens: `gate(x_TD)` is a `Routing`.

    A gate may be built without its input width; the `MoE` layer that takes it calls
    `materialize`. Logits, softmax and losses are computed in float32 (float64 for float64
    input) whatever the autocast state, since a gate's choices are discrete.

    Args:
        num_experts: E, experts to choose from.
        k: Experts of a token; on average, for gates in which experts choose tokens.
        d_model: D, width of the tokens; None: given later by `materialize`.

    Raises:
        GateError: `k` is below 1 or above `num_experts`.
    """

    def __init__(self, num_experts: int, k: int, *, d_model: int | None = None) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise GateError(
                f"k={k} experts of a token cannot be chosen from {num_experts} experts",
                hint="choose 1 <= k <= num_experts",
            )
        self.num_experts = num_experts
        self.k = k
        self.d_model: int | None = None
        if d_model is not None:
            self.materialize(d_model)

    def materialize(self, d_model: int) -> None:
        """Creates the weights for tokens of width `d_model`; does nothing if they exist.

        Raises:
            GateError: The gate already has weights of another width.
        """
        if self.d_model is None:
            if d_model < 1:
                raise GateError(f"d_model={d_model} is not a width")
            self.d_model = d_model
            self._create_weights(d_model)
        elif self.d_model != d_model:
            raise GateError(f"the gate has d_model={self.d_model}, the layer {d_model}")

    def forward(self, x_TD: Tensor) -> Routing:
        """Routes a batch of tokens.

        Args:
            x_TD: Token vectors of shape (tokens, d_model), any floating dtype.

        Raises:
            GateError: Wrong shape or dtype, no tokens, or weights not yet created.
        """
        if self.d_model is None:
            raise GateError("the gate does not know its width yet", hint="pass d_model= or put it into a MoE layer")
        if x_TD.dim() != 2 or x_TD.shape[1] != self.d_model:
            raise GateError(f"x_TD has shape {tuple(x_TD.shape)}, expected (tokens, {self.d_model})")
        if x_TD.shape[0] == 0:
            raise GateError("x_TD is empty: a gate needs at least one token")
        if not x_TD.is_floating_point():
            raise GateError(f"x_TD has dtype {x_TD.dtype}, expected a floating point dtype")
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._route(x_TD)

    def end_step(self) -> None:
        """Is called once after each optimizer step; gates that adapt outside of gradients do it here."""

    @abstractmethod
    def _create_weights(self, d_model: int) -> None: ...

    @abstractmethod
    def _route(self, x_TD: Tensor) -> Routing: ...

    def extra_repr(self) -> str:
        """Shows the sizes in `print(module)`."""
        return f"num_experts={self.num_experts}, k={self.k}, d_model={self.d_model}"


def project(x_TD: Tensor, w_DE: Tensor) -> Tensor:
    """Logits x W in float32, or in float64 if the tokens are float64; no bias (section 2.1)."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return x_TD.to(dtype) @ w_DE.to(dtype)
