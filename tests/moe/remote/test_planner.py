from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.moe import PoolError
from moa_ray.moe.remote.placement import check_placement, choose_holders, spread
from moa_ray.moe.remote.planner import plan, rebalance

# The example of DeepSeek's EPLB: two layers of 12 experts in 4 groups, 16 slots, 2 nodes, 8 devices.
LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_worked_example_of_eplb_comes_out(layer: int) -> None:
    assert rebalance(LOAD[layer], 16, 4, 2, 8) == SLOTS[layer]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=24), st.integers(1, 6), st.integers(0, 3))
def test_every_expert_has_a_place_and_no_worker_more_than_its_slots(
    load: list[float], workers: int, spare: int
) -> None:
    slots = -(-len(load) // workers) + spare
    placement = plan(load, [f"w{i}" for i in range(workers)], slots)
    check_placement(placement, len(load))
    assert all(len(experts) <= slots for experts in placement.values())


def test_a_hot_expert_is_on_several_workers() -> None:
    placement = plan([1000, 1, 1, 1], ["a", "b"], slots=3)
    assert all(0 in experts for experts in placement.values())


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(PoolError, match="4 slots do not hold 5 experts"):
        plan([1] * 5, ["a", "b"], slots=2)
    with pytest.raises(PoolError, match="12 is not divisible by 5"):
        rebalance([1] * 12, 15, 5, 1, 5)


def test_shards_are_even_and_layers_are_spread_over_all_of_them() -> None:
    assert spread(5, 2, 1) == {"shard-0.0": (0, 1), "shard-1.0": (2, 3, 4)}
    assert spread(8, 2, 1, layers=2) == {"shard-0.0": (0, 1, 4, 5), "shard-1.0": (2, 3, 6, 7)}


def test_rows_are_shared_evenly_and_few_rows_in_few_messages() -> None:
    both = {expert: ["a", "b"] for expert in range(4)}
    assert sorted(map(len, choose_holders({e: 1000 for e in range(4)}, both).values())) == [2, 2]
    assert len(choose_holders({e: 10 for e in range(4)}, both)) == 1
    assert {next(iter(choose_holders({0: 1}, both, turn))) for turn in (0, 1)} == {"a", "b"}
