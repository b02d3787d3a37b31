"""Paired statistics of answers to the same questions: intervals, exact tests, the length-controlled win rate.

Everything is deterministic: resamples are drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import comb
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Of = Callable[[Array], Array]
"""From means of columns, (B, C), to what is estimated, (B,)."""

LEVEL = 0.95
_RESAMPLES = 10_000
_REFITS = 2_000
"""Resamples of the length-controlled win rate, each of which is a regression."""
_AT_ONCE = 500
"""Resamples in memory."""
_NEWTON_STEPS = 30
_RIDGE = 0.1
"""Penalty on the squared coefficients: without it there is no fit where one side wins everything."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence interval; NaN where there is nothing to estimate it from."""

    estimate: float
    low: float
    high: float


def _first(means: Array) -> Array:
    """The mean itself."""
    return means[:, 0]


def ratio(means: Array) -> Array:
    """The first mean over the second; inf where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return means[:, 0] / means[:, 1]


def bootstrap(
    columns: ArrayLike, of: Of = _first, *, level: float = LEVEL, resamples: int = _RESAMPLES, seed: int = 0
) -> Interval:
    """A bootstrap interval, bias-corrected and accelerated (Efron 1987), of a function of means.

    The items are resampled whole, so columns stay paired: a difference of two arms is one column, a ratio two.

    Args:
        columns: (N,) or (N, C), a row an item.
        of: What is estimated; the mean of the first column where not given.
        level: Share of intervals that are to hold the truth.
        resamples: How many are drawn.
        seed: Of the draw.
    """
    rows = np.asarray(columns, np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    count = len(rows)
    if not count:
        return Interval(np.nan, np.nan, np.nan)
    estimate = float(of(rows.mean(0, keepdims=True))[0])
    drawn = np.concatenate([of(weights @ rows / count) for weights in _resamples(count, resamples, seed)])
    left_out = of((rows.sum(0) - rows) / (count - 1)) if count > 1 else np.full(1, estimate)
    return Interval(estimate, *_bca(estimate, drawn, left_out, level))


def _resamples(count: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each item is in each resample, (B, N) at a time."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _AT_ONCE):
        size = min(_AT_ONCE, resamples - start)
        drawn = random.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)


def _bca(estimate: float, drawn: Array, left_out: Array, level: float) -> tuple[float, float]:
    """Ends of the interval: the quantiles of `drawn`, moved by its bias and by the jackknife's skewness."""
    below = (np.mean(drawn < estimate) + np.mean(drawn <= estimate)) / 2
    finite = np.isfinite(estimate) and np.isfinite(drawn).all() and np.isfinite(left_out).all()
    if not finite or not 0 < below < 1:
        return tuple(np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], method="nearest").tolist())
    normal = NormalDist()
    bias = normal.inv_cdf(float(below))
    away = left_out.mean() - left_out
    spread = float((away**2).sum()) ** 1.5
    skew = float((away**3).sum()) / (6 * spread) if spread else 0.0
    ends = (normal.inv_cdf((1 - level) / 2), normal.inv_cdf((1 + level) / 2))
    shares = [normal.cdf(bias + (bias + end) / (1 - skew * (bias + end))) for end in ends]
    low, high = np.quantile(drawn, shares).tolist()
    return low, high


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value of a sign test; ties say nothing and are not given.

    On the questions that only one of two arms answered right, it is the exact McNemar test (McNemar 1947).
    """
    count = wins + losses
    tail = sum(comb(count, each) for each in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**count))


def mcnemar(ours: ArrayLike, theirs: ArrayLike) -> float:
    """The exact two-sided p-value of McNemar's test: do two arms answer equally many of the same questions right?

    Args:
        ours: (N,), whether each answer is right.
        theirs: (N,), the same of the other arm.
    """
    one, two = np.asarray(ours, bool), np.asarray(theirs, bool)
    return sign_test(int((one & ~two).sum()), int((~one & two).sum()))


# ---------------------------------------------------------------- length


def length_controlled(
    preferences: ArrayLike, lengths: ArrayLike, *, level: float = LEVEL, resamples: int = _REFITS, seed: int = 0
) -> Interval:
    """The win rate that a judge would have given to answers of equal length.

    As AlpacaEval 2 (Dubois et al. 2024, eq. 2) has it: a logistic regression of the preference on a constant and on
    tanh of the standardised difference in length; the win rate is its prediction at no difference. Left out is the
    term for the difficulty of an instruction, which is estimated from a leaderboard that other data do not have.

    Args:
        preferences: (N,), from 0 (lost) to 1 (won), 0.5 for a tie.
        lengths: (N, 2), characters of our answer and of the other.
        level: Of the interval, a bootstrap over the items.
        resamples: How many are drawn.
        seed: Of the draw.
    """
    wanted, size = np.asarray(preferences, np.float64), np.asarray(lengths, np.float64)
    if not len(wanted):
        return Interval(np.nan, np.nan, np.nan)
    longer = size[:, 0] - size[:, 1]
    spread = longer.std(ddof=1) if len(longer) > 1 else 0.0
    terms = np.stack([np.ones_like(longer), np.tanh(longer / spread) if spread else np.zeros_like(longer)], axis=1)
    estimate = float(_equal_length(wanted, terms, np.ones((1, len(wanted))))[0])
    drawn = np.concatenate(
        [_equal_length(wanted, terms, weights) for weights in _resamples(len(wanted), resamples, seed)]
    )
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(estimate, low, high)


def _equal_length(wanted: Array, terms: Array, weights: Array) -> Array:
    """The win rate at no difference in length, of a penalised logistic fit for each row of `weights`.

    Args:
        wanted: (N,) preferences.
        terms: (N, 2), the constant and the term of length.
        weights: (B, N), how much each item counts.
    """
    fitted = np.zeros((len(weights), 2))
    products = np.einsum("ni,nj->nij", terms, terms).reshape(len(terms), 4)
    for _ in range(_NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-fitted @ terms.T))
        slope = (weights * (wanted - chance)) @ terms - _RIDGE * fitted
        curve = ((weights * chance * (1 - chance)) @ products).reshape(-1, 2, 2) + _RIDGE * np.eye(2)
        step = np.linalg.solve(curve, slope[..., None])[..., 0]
        fitted += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-8:
            break
    rate: Array = 1 / (1 + np.exp(-fitted[:, 0]))
    return rate
