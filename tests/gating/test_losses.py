from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.gating import balance_losses, cv_squared

LOADS = st.lists(st.floats(0.1, 1000), min_size=1, max_size=20)


@given(LOADS)
def test_cv_squared_uses_the_population_variance(values: list[float]) -> None:
    expected = (np.std(values) / np.mean(values)) ** 2
    assert float(cv_squared(torch.tensor(values, dtype=torch.float64))) == pytest.approx(expected, abs=1e-8)


@given(LOADS, st.floats(0.5, 100))
def test_cv_squared_does_not_depend_on_scale(values: list[float], scale: float) -> None:
    x_E = torch.tensor(values, dtype=torch.float64)
    assert float(cv_squared(x_E * scale)) == pytest.approx(float(cv_squared(x_E)), rel=1e-6, abs=1e-8)


def test_cv_squared_of_one_expert_and_of_no_load_is_zero() -> None:
    assert float(cv_squared(torch.tensor([3.0]))) == 0
    assert float(cv_squared(torch.zeros(4))) == 0


def test_losses_are_scaled_and_a_weight_of_zero_leaves_the_term_out() -> None:
    importance_E, load_E = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
    losses = balance_losses(importance_E, load_E, 0.5, 0.0)
    assert losses.keys() == {"importance"}
    assert float(losses["importance"]) == pytest.approx(0.5 * 0.25)
