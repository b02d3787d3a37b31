"""Speed of the local layer, always as a ratio of two sides measured in turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moa_ray.gating import NoisyTopK
from moa_ray.moe.experts import FeedForward, LocalExperts
from moa_ray.moe.layer import MoE
from moa_ray.moe.model import LanguageModel, LSTMLayer, MoELayer


def compare(sides: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each side; the sides take turns, so that a noisy neighbour hits both."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(rounds + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def grouped_against_dense(
    *,
    tokens: int = 4096,
    d_model: int = 512,
    d_hidden: int = 1024,
    experts: int = 32,
    k: int = 4,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
) -> dict[str, float]:
    """Seconds of the grouped experts, of the whole layer, and of one dense network of equal FLOPs.

    The dense side takes the same tokens * k rows through one pair of matrices; the routing is
    the gate's own first one.

    Returns:
        Seconds by name: `dense`, `experts`, `layer`.
    """
    torch.manual_seed(0)
    layer = MoE(d_model, NoisyTopK(experts, k), LocalExperts(experts, d_model, d_hidden)).to(device, dtype)
    dense = FeedForward(d_model, d_hidden).to(device, dtype)
    x_TD = torch.randn(tokens, d_model, device=device, dtype=dtype, requires_grad=backward)
    rows_RD = torch.randn(tokens * k, d_model, device=device, dtype=dtype, requires_grad=backward)
    counts_E = layer(x_TD)[1].routing.counts()

    def timed(call: Callable[[], Tensor]) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                call()

        def both() -> None:
            y = call()
            y.backward(torch.ones_like(y))

        return both if backward else forward

    return compare(
        {
            "dense": timed(lambda: dense(rows_RD)),
            "experts": timed(lambda: layer.experts(rows_RD, counts_E)),
            "layer": timed(lambda: layer(x_TD)[0]),
        }
    )


def training_step(
    experts: tuple[int, ...] = (4, 32, 256),
    *,
    d_model: int = 128,
    d_hidden: int = 256,
    streams: int = 256,
    window: int = 32,
    vocab_size: int = 256,
) -> dict[str, float]:
    """Seconds of a whole training step of the language model, by its number of experts.

    k = 4 throughout, so operations per time step are equal but for the gate's own d * E.
    """
    sides: dict[str, Callable[[], object]] = {}
    for number in experts:
        torch.manual_seed(0)
        moe = MoE(d_model, NoisyTopK(number, 4), LocalExperts(number, d_model, d_hidden))
        model = LanguageModel(vocab_size, d_model, [LSTMLayer(d_model), MoELayer(moe), LSTMLayer(d_model)], 0.0)
        tokens_SB = torch.randint(vocab_size, (window, streams))
        sides[str(number)] = _step(model, tokens_SB)
    return compare(sides)


def _step(model: LanguageModel, tokens_SB: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step() -> None:
        x_SBD, _, said = model.features(tokens_SB)
        loss = torch.nn.functional.cross_entropy(model.softmax(x_SBD.flatten(0, 1)), tokens_SB.flatten())
        optimizer.zero_grad()
        (loss + sum(aux.loss for aux in said)).backward()
        optimizer.step()

    return step
