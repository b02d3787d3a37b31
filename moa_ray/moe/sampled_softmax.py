"""Sampled softmax for large vocabularies.

Shape suffixes: T tokens, D model width, V vocabulary, N sampled words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def log_uniform(vocab_size: int, device: torch.device | None = None) -> Tensor:
    """Sampling probabilities of words numbered by falling frequency: log((w + 2) / (w + 1)) / log(V + 1)."""
    edges = torch.arange(1, vocab_size + 2, dtype=torch.float64, device=device).log()
    return (edges.diff() / edges[-1]).float()


def sampled_softmax_loss(x_TD: Tensor, targets_T: Tensor, layer: nn.Linear, samples: int) -> Tensor:
    """Cross-entropy whose normaliser is estimated from words drawn once for the whole batch.

    The sum over the words that are not the target is estimated by importance sampling with
    replacement: each drawn word w counts exp(logit_w) / (N q(w)). The estimate of the normaliser
    is unbiased, so the loss approaches the full one as N grows. Words must be numbered by
    falling frequency.

    Args:
        x_TD: Features.
        targets_T: Target words, int64.
        layer: The softmax layer; only its target and sampled rows are read.
        samples: N, words drawn.

    Returns:
        Mean loss in nats, a scalar.
    """
    q_V = log_uniform(layer.out_features, x_TD.device)
    drawn_N = torch.multinomial(q_V, samples, replacement=True)
    target_T = (x_TD * F.embedding(targets_T, layer.weight)).sum(-1) + layer.bias[targets_T]
    noise_TN = F.linear(x_TD, F.embedding(drawn_N, layer.weight), layer.bias[drawn_N])
    noise_TN = noise_TN - (samples * q_V[drawn_N]).log()
    noise_TN = noise_TN.masked_fill(drawn_N == targets_T[:, None], -torch.inf)
    normaliser_T = torch.cat([target_T[:, None], noise_TN], dim=1).logsumexp(1)
    return (normaliser_T - target_T).mean()
