from __future__ import annotations

import math

import pytest
import torch

from moa_ray.gating import GateStats, Routing


def stats(counts: list[int], load: list[float] | None = None, routes: int | None = None) -> GateStats:
    counts_E = torch.tensor(counts)
    load_E = torch.tensor(load) if load else counts_E.float()
    return GateStats(counts_E.float(), load_E, counts_E, torch.tensor(routes or sum(counts)))


def test_figures_of_a_known_load() -> None:
    s = stats([6, 2, 0, 0])
    assert s.max_over_mean_load == pytest.approx(3)
    assert s.max_vio == pytest.approx(2)
    assert s.cv_load == pytest.approx(math.sqrt(6) / 2)
    assert s.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_an_even_load_is_perfect_in_every_figure() -> None:
    s = stats([4, 4, 4])
    assert (s.cv_importance, s.cv_load, s.max_vio, s.dropped) == pytest.approx((0, 0, 0, 0))
    assert s.max_over_mean_load == pytest.approx(1)
    assert s.entropy == pytest.approx(math.log(3))


def test_smooth_load_and_received_tokens_are_kept_apart() -> None:
    s = stats([1, 3], load=[2.0, 2.0])
    assert s.max_over_mean_load == pytest.approx(1)
    assert s.max_vio == pytest.approx(0.5)


def test_batches_add_up() -> None:
    total = stats([6, 0]) + stats([0, 6])
    assert total.max_vio == pytest.approx(0)
    assert total.counts_E.tolist() == [6, 6]


def test_dropped_is_the_share_of_routes_that_reached_no_expert() -> None:
    assert stats([3, 3], routes=8).dropped == pytest.approx(0.25)


def test_of_a_routing_is_detached_and_named() -> None:
    weights = torch.tensor([[0.7, 0.3]], requires_grad=True)
    routing = Routing(torch.tensor([[0, 2]]), weights, weights.new_ones(3) * weights.sum(), torch.ones(3))
    s = GateStats.of(routing, routing.counts())
    assert not s.importance_E.requires_grad
    assert int(s.routes) == 2
    names = {"cv_importance", "cv_load", "max_over_mean_load", "max_vio", "entropy", "dropped"}
    assert s.summary().keys() == names
