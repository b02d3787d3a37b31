from __future__ import annotations

import pytest

from moa_ray.errors import EngineError, EngineOverloaded, EngineRefused, EngineTimeout, EngineUnavailable
from moa_ray.runtime.health import FAILURES_TO_OPEN, Budget, EngineHealth


def _broken() -> EngineHealth:
    """An engine that was called again and again, the last time at second 5, and failed each time."""
    health = EngineHealth()
    for second in range(FAILURES_TO_OPEN):
        assert health.admit(second)
        health.failed(EngineUnavailable("down"), started=second, now=second + 0.5)
    return health


def test_failures_in_a_row_stop_the_calls_and_one_success_lets_them_pass_again() -> None:
    health = _broken()
    assert health.is_open and not health.admit(5.0)
    assert health.admit(10.0)
    health.succeeded(0.1)
    assert not health.is_open and health.admit(10.0) and health.admit(10.0)


def test_a_single_probe_is_let_through_and_its_failure_doubles_the_rest() -> None:
    health = _broken()
    assert health.admit(6.0) and not health.admit(6.0)
    health.failed(EngineTimeout("late"), started=6.0, now=7.0)
    assert not health.admit(8.9) and health.admit(9.0)


def test_a_probe_that_is_cut_off_leaves_room_for_another() -> None:
    health = _broken()
    assert health.admit(6.0)
    health.released()
    assert health.admit(6.0)


def test_calls_that_die_together_count_as_one_failure() -> None:
    health = EngineHealth()
    for _ in range(10 * FAILURES_TO_OPEN):
        health.failed(EngineUnavailable("the replica died"), started=0.0, now=1.0)
    assert not health.is_open


@pytest.mark.parametrize("error", [EngineRefused("no such model"), EngineOverloaded("429", retry_after_s=1)])
def test_an_engine_that_answers_with_a_refusal_is_not_down(error: EngineError) -> None:
    health = EngineHealth()
    for second in range(10):
        health.failed(error, started=second, now=second)
    assert not health.is_open


def test_a_percentile_is_told_once_there_are_enough_times() -> None:
    health = EngineHealth()
    for n in range(1, 20):
        health.succeeded(float(n))
    assert health.ttft_percentile(95) is None
    health.succeeded(20.0)
    assert (health.ttft_percentile(95), health.ttft_percentile(50)) == (19.0, 10.0)


def test_a_budget_is_spent_and_earned_back_by_ordinary_calls() -> None:
    budget = Budget(2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(5):
        budget.earn(0.2)
    assert [budget.spend() for _ in range(2)] == [True, False]
