"""The benchmarks run; what they measure depends on the machine and is not asserted."""

from __future__ import annotations

from moa_ray.moe.bench import compare, grouped_against_dense, training_step


def test_sides_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    seconds = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert seconds.keys() == {"a", "b"}


def test_every_side_is_measured() -> None:
    for backward in (False, True):
        seconds = grouped_against_dense(tokens=16, d_model=8, d_hidden=8, experts=4, k=2, backward=backward)
        assert seconds.keys() == {"dense", "experts", "layer"}
    assert training_step((4, 8), d_model=8, d_hidden=8, streams=2, window=4).keys() == {"4", "8"}
