"""Known answers: effects that were planted are found as often as theory says, intervals hold the truth as promised."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moa_ray.evaluate.statistics import Interval, bootstrap, length_controlled, mcnemar, ratio, sign_test


def outcomes(random: np.random.Generator, items: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Two arms over the same items: ours is right on a share `gain` more; most items are alike for both."""
    draw = random.random(items)
    theirs = draw < 0.5
    ours = np.where(draw < 0.05, False, draw < 0.55 + gain)
    return ours, theirs


def test_a_planted_gain_of_10_points_is_found_with_the_power_that_theory_gives() -> None:
    # 15 % of the items only ours gets right, 5 % only theirs: with 300 items the difference is 3.9 standard errors
    # from 0, and the power of a two-sided test at 5 % is 0.97.
    random = np.random.default_rng(1)
    found, significant, trials = 0, 0, 300
    for seed in range(trials):
        ours, theirs = outcomes(random, 300, 0.10)
        interval = bootstrap(ours.astype(float) - theirs, resamples=1000, seed=seed)
        found += interval.low > 0
        significant += mcnemar(ours, theirs) < 0.05
    assert found / trials > 0.94 and significant / trials > 0.92


@pytest.mark.parametrize(("items", "gain"), [(50, 0.1), (200, 0.0), (200, 0.2)])
def test_an_interval_holds_the_truth_at_its_nominal_rate(items: int, gain: float) -> None:
    random = np.random.default_rng(2)
    trials, held = 1000, 0
    for seed in range(trials):
        ours, theirs = outcomes(random, items, gain)
        interval = bootstrap(ours.astype(float) - theirs, resamples=1000, seed=seed)
        held += interval.low <= gain <= interval.high
    # The rate's own standard error is 0.7 points; discreteness of 50 items takes some more.
    assert 0.925 <= held / trials <= 0.975


def test_where_there_is_no_effect_tests_reject_at_most_as_often_as_they_say() -> None:
    random = np.random.default_rng(3)
    rejected = sum(mcnemar(*outcomes(random, 200, 0.0)) < 0.05 for _ in range(1000))
    assert rejected <= 65  # 50 wanted at most, 3 standard errors are 2 points


def test_a_pairing_makes_the_interval_narrower_than_the_arms_alone_would() -> None:
    ours, theirs = outcomes(np.random.default_rng(4), 400, 0.1)
    paired = bootstrap(ours.astype(float) - theirs)
    shuffled = np.random.default_rng(5).permutation(theirs)
    unpaired = bootstrap(ours.astype(float) - shuffled)
    assert paired.estimate == pytest.approx(unpaired.estimate)
    assert paired.high - paired.low < 0.75 * (unpaired.high - unpaired.low)


def test_the_interval_of_a_ratio_holds_it() -> None:
    random = np.random.default_rng(6)
    trials, held = 300, 0
    for seed in range(trials):
        right = random.random(150) < 0.4
        tokens = random.exponential(100, 150)
        interval = bootstrap(np.stack([tokens, right], axis=1), ratio, resamples=1000, seed=seed)
        held += interval.low <= 250 <= interval.high
    assert 0.91 <= held / trials <= 0.98


def test_nothing_to_count_and_nothing_that_varies_are_no_errors() -> None:
    assert math.isnan(bootstrap([]).estimate) and math.isnan(length_controlled([], np.empty((0, 2))).low)
    assert bootstrap([0.0] * 20) == Interval(0.0, 0.0, 0.0)
    assert bootstrap([1.0]) == Interval(1.0, 1.0, 1.0)
    assert bootstrap([[10, 0]] * 5, ratio).estimate == math.inf


def test_the_sign_test_is_the_binomial_one() -> None:
    assert sign_test(0, 0) == sign_test(4, 4) == 1.0
    assert sign_test(5, 0) == sign_test(0, 5) == 2 / 32
    assert sign_test(9, 1) == pytest.approx(22 / 1024)
    assert sign_test(900, 1100) == pytest.approx(8.4e-6, rel=0.1)
    assert mcnemar([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1]) == 2 / 32


def test_a_judge_that_likes_length_is_seen_through() -> None:
    # Equally good answers; ours is longer most of the time, and the longer one is preferred.
    random = np.random.default_rng(7)
    items = 600
    lengths = np.stack([random.normal(1200, 300, items), random.normal(1000, 300, items)], axis=1)
    longer = (lengths[:, 0] - lengths[:, 1]) / (lengths[:, 0] - lengths[:, 1]).std(ddof=1)
    preferred = random.random(items) < 1 / (1 + np.exp(-2 * np.tanh(longer)))
    assert preferred.mean() > 0.6
    controlled = length_controlled(preferred, lengths)
    assert controlled.low < 0.5 < controlled.high and controlled.estimate == pytest.approx(0.5, abs=0.05)


def test_a_better_arm_stays_better_when_length_is_controlled() -> None:
    random = np.random.default_rng(8)
    lengths = random.normal(1000, 300, (600, 2))
    longer = (lengths[:, 0] - lengths[:, 1]) / (lengths[:, 0] - lengths[:, 1]).std(ddof=1)
    preferred = random.random(600) < 1 / (1 + np.exp(-1.0 - 2 * np.tanh(longer)))
    controlled = length_controlled(preferred, lengths)
    assert controlled.low <= 1 / (1 + math.exp(-1)) <= controlled.high and controlled.low > 0.6


def test_the_length_controlled_rate_holds_the_truth_at_its_nominal_rate() -> None:
    random = np.random.default_rng(9)
    trials, held, truth = 200, 0, 1 / (1 + math.exp(-0.5))
    for seed in range(trials):
        longer = random.normal(0.3, 1, 200)
        lengths = np.stack([1000 + 100 * longer, np.full(200, 1000.0)], axis=1)
        preferred = random.random(200) < 1 / (1 + np.exp(-0.5 - np.tanh(longer)))
        interval = length_controlled(preferred, lengths, resamples=300, seed=seed)
        held += interval.low <= truth <= interval.high
    assert 0.90 <= held / trials <= 0.99


def test_a_clean_sweep_and_equal_lengths_have_a_rate() -> None:
    swept = length_controlled([1.0] * 30, [[100 + n, 50] for n in range(30)])
    assert 0.9 < swept.estimate < 1 and swept.low > 0.8
    level = length_controlled([1.0, 0.0, 0.5, 0.5], [[10, 10]] * 4)
    assert level.estimate == pytest.approx(0.5)


def test_scipy_agrees() -> None:
    stats = pytest.importorskip("scipy.stats")
    optimize = pytest.importorskip("scipy.optimize")
    random = np.random.default_rng(10)
    for wins, losses in ((3, 9), (0, 7), (40, 41), (120, 80)):
        assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    values = random.exponential(1.0, 80)
    ours = bootstrap(values, resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=random).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)

    lengths = random.normal(1000, 300, (200, 2))
    preferences = random.choice([0.0, 0.5, 1.0], 200)
    longer = lengths[:, 0] - lengths[:, 1]
    term = np.tanh(longer / longer.std(ddof=1))

    def loss(fitted: np.ndarray) -> float:
        score = fitted[0] + fitted[1] * term
        return float(np.sum(np.logaddexp(0, score) - preferences * score) + 0.05 * fitted @ fitted)

    constant = optimize.minimize(loss, [0.0, 0.0], tol=1e-12).x[0]
    assert length_controlled(preferences, lengths).estimate == pytest.approx(1 / (1 + math.exp(-constant)), abs=1e-5)
