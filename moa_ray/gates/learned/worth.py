"""What agents are worth on a question, out of noisy rewards: agents that cannot be told apart are worth the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moa_ray.gates.learned.outcomes import Outcomes

_ROWS = 256


def settled(known: Outcomes, vectors_ND: NDArray[np.float32], neighbours: int) -> NDArray[np.float32]:
    """Rewards (N, E + 1), the panel's last, of which the mean over neighbours is what similar questions tell.

    An answer that was not judged counts as its agent's mean. Differences between agents, over all questions and between
    a question's neighbourhood and the rest, are shrunk by the share of them that chance alone would bring about
    (Efron and Morris 1973): over all questions by the standard errors of the means, around a question by what is left
    of the differences when the rewards are dealt out to other questions.
    """
    judged_NE = ~np.isnan(known.rewards)
    count_E = np.maximum(judged_NE.sum(axis=0), 1)
    mean_E = np.where(judged_NE, known.rewards, 0).sum(axis=0) / count_E
    error_E = np.where(judged_NE, (known.rewards - mean_E) ** 2, 0).sum(axis=0) / count_E**2
    apart_NE = np.where(judged_NE, known.rewards - mean_E, 0).astype(np.float32)
    shuffled_NE = apart_NE[np.random.default_rng(0).permutation(len(apart_NE))]
    by_chance, seen = (_spread(around(vectors_ND, each, neighbours)) for each in (shuffled_NE, apart_NE))
    agents = mean_E[:-1]
    kept = _kept(float(error_E[:-1].mean()), float(agents.var()))
    shrunk_E = np.append(agents.mean() + kept * (agents - agents.mean()), mean_E[-1])
    rewards_NE: NDArray[np.float32] = (shrunk_E + _kept(by_chance, seen) * apart_NE).astype(np.float32)
    return rewards_NE


def around(vectors_ND: NDArray[np.float32], values_NE: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Mean of `values` over the `count` nearest neighbours of each question, itself left out."""
    count = min(count, max(len(vectors_ND) - 1, 1))
    means = []
    for start in range(0, len(vectors_ND), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(vectors_ND)))
        similarity = vectors_ND[rows] @ vectors_ND.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        means.append(values_NE[nearest].mean(axis=1))
    return np.concatenate(means)


def _spread(values_NE: NDArray[np.float32]) -> float:
    """Variance of the differences between agents."""
    agents = values_NE[:, :-1]
    return float((agents - agents.mean(axis=1, keepdims=True)).var())


def _kept(by_chance: float, seen: float) -> float:
    """Share of a variance that is not chance."""
    return max(0.0, 1 - by_chance / seen) if seen > 0 else 0.0
