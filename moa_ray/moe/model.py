"""The recurrent language model with a Mixture-of-Experts layer in it (Shazeer et al. 2017, appendix C.1).

Embedding, LSTM, MoE, LSTM, softmax. After each layer but the softmax: dropout, then the layer's
input is added. The MoE's output goes through a sigmoid before dropout, and the MoE is applied
to all unrolled time steps at once (section 3.1, "convolutionality").

Shape suffixes: S time steps, B streams of text, V vocabulary; otherwise see `grouped.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from moa_ray.moe.experts import FeedForward
from moa_ray.moe.layer import MoE, MoEAux

LSTMState = tuple[Tensor, Tensor]
State = list[LSTMState | None]
"""Recurrent state of every layer of a stack; None for layers without one, and before the first step."""


class Layer(nn.Module):
    """A layer of a `ResidualStack`: maps (S, B, D) to (S, B, D), with a recurrent state if it has one."""

    def forward(self, x_SBD: Tensor, state: LSTMState | None) -> tuple[Tensor, LSTMState | None, MoEAux | None]:
        """Returns the result, the state after the last step, and what a MoE says besides."""
        raise NotImplementedError


class LSTMLayer(Layer):
    """One LSTM of the model's width; in float32 on CPU, under autocast too."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d_model, d_model)

    def forward(self, x_SBD: Tensor, state: LSTMState | None) -> tuple[Tensor, LSTMState | None, None]:
        """Runs over the steps from `state`, zeros if None."""
        # torch has a bfloat16 LSTM only for CPUs with AVX-512, and fails on others.
        on_cpu = x_SBD.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            y_SBD, new_state = self.lstm(x_SBD, state)
        return y_SBD, new_state, None


class MoELayer(Layer):
    """A MoE over all steps at once, its output squashed by a sigmoid."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_SBD: Tensor, state: LSTMState | None) -> tuple[Tensor, None, MoEAux]:
        """Has no state."""
        y_SBD, aux = self.moe(x_SBD)
        return y_SBD.sigmoid(), None, aux


class DenseLayer(Layer):
    """A feed-forward network in the place of the MoE, with the same sigmoid: a control of equal operations.

    Args:
        d_model: D.
        hidden: Widths of its ReLU layers: one wide one, or several.
    """

    def __init__(self, d_model: int, hidden: Sequence[int]) -> None:
        super().__init__()
        if len(hidden) == 1:
            self.net: nn.Module = FeedForward(d_model, hidden[0])
            return
        widths = [d_model, *hidden]
        blocks = [m for a, b in zip(widths, hidden, strict=False) for m in (nn.Linear(a, b, bias=False), nn.ReLU())]
        self.net = nn.Sequential(*blocks, nn.Linear(widths[-1], d_model, bias=False))

    def forward(self, x_SBD: Tensor, state: LSTMState | None) -> tuple[Tensor, None, None]:
        """Has no state."""
        return self.net(x_SBD).sigmoid(), None, None


class ResidualStack(nn.Module):
    """Layers with dropout on each output and the layer's input added (appendix C.1).

    An encoder or a decoder is such a stack; the language model is one between embedding and softmax.
    """

    def __init__(self, layers: Sequence[Layer], dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_SBD: Tensor, state: State | None = None) -> tuple[Tensor, State, list[MoEAux]]:
        """Returns the result, the recurrent state after the last step, and what each MoE said."""
        states: State = []
        said: list[MoEAux] = []
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            y_SBD, after, aux = layer(x_SBD, before)
            x_SBD = x_SBD + self.dropout(y_SBD)
            states.append(after)
            if aux is not None:
                said.append(aux)
        return x_SBD, states, said


class LanguageModel(nn.Module):
    """Embedding, dropout, a residual stack, softmax.

    Args:
        vocab_size: V.
        d_model: D, width of everything between embedding and softmax.
        layers: The stack, as in `[LSTMLayer(d), MoELayer(moe), LSTMLayer(d)]`.
        dropout: Probability of dropping an activation.
    """

    def __init__(self, vocab_size: int, d_model: int, layers: Sequence[Layer], dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        self.stack = ResidualStack(layers, dropout)
        self.softmax = nn.Linear(d_model, vocab_size)

    def features(self, tokens_SB: Tensor, state: State | None = None) -> tuple[Tensor, State, list[MoEAux]]:
        """What the softmax layer sees; shapes as in `ResidualStack.forward`."""
        result: tuple[Tensor, State, list[MoEAux]] = self.stack(self.dropout(self.embedding(tokens_SB)), state)
        return result

    def forward(self, tokens_SB: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of the next token at every step.

        Args:
            tokens_SB: Token numbers, int64.
            state: State after the steps before; None at the start of the text.

        Returns:
            Logits of shape (S, B, V), and the state after the last step.
        """
        x_SBD, state, _ = self.features(tokens_SB, state)
        return self.softmax(x_SBD), state

    def end_step(self) -> None:
        """Call once after each optimizer step; passed on to the gates."""
        for module in self.modules():
            if isinstance(module, MoE):
                module.end_step()


def detach_state(state: State) -> State:
    """Cuts the graph between two windows of truncated back-propagation through time."""
    return [None if pair is None else (pair[0].detach(), pair[1].detach()) for pair in state]


def count_parameters(model: nn.Module) -> int:
    """All parameters, those of experts that rest included."""
    return sum(p.numel() for p in model.parameters())
