from __future__ import annotations

from typing import Any

import pytest

from moa_ray.engines import Usage
from moa_ray.runtime import (
    AgentCancelled,
    AgentFailed,
    AgentFinished,
    AgentStarted,
    EngineLoad,
    GateDecided,
    GateLoad,
    Meter,
    meter,
)

HEAD = ("run-1", 0.0, "1/a", "a", "script", 1, 1)


def _finished(seconds: float) -> AgentFinished:
    return AgentFinished(*HEAD, "text", Usage(), seconds, 0.1, "stop")


def test_a_call_is_ongoing_from_its_start_to_its_end() -> None:
    meter = Meter()
    meter.add(AgentStarted(*HEAD, 0))
    assert meter.load()["script"].ongoing == 1
    meter.add(_finished(2.0))
    assert meter.load()["script"] == EngineLoad(0, (2.0,), 0)


def test_a_retried_call_counts_its_failure_and_its_success() -> None:
    meter = Meter()
    for event in (AgentStarted(*HEAD, 0), AgentFailed(*HEAD, "E", "", True, 1.0, Usage()), _finished(2.0)):
        meter.add(event)
    assert meter.load()["script"] == EngineLoad(0, (2.0,), 1)


def test_a_cancelled_call_is_neither_finished_nor_failed() -> None:
    meter = Meter()
    meter.add(AgentStarted(*HEAD, 0))
    meter.add(AgentCancelled(*HEAD, "nobody waits", 1.0, Usage()))
    assert meter.load() == {}


def test_a_run_that_was_given_up_leaves_no_call_ongoing() -> None:
    meter = Meter()
    meter.add(AgentStarted(*HEAD, 0))
    meter.end("run-1")
    assert meter.load() == {}


def test_what_is_older_than_the_window_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    metered = Meter()
    metered.add(_finished(2.0))
    clock[0] += meter.WINDOW_S + 1
    assert metered.load() == {}


def test_loads_of_several_routers_add_up_to_percentiles_and_a_rate() -> None:
    load = EngineLoad(1, tuple(n / 100 for n in range(0, 101, 2)), 1) + EngineLoad(
        2, tuple(n / 100 for n in range(1, 101, 2))
    )
    assert (load.ongoing, load.failed) == (3, 1)
    assert load.percentile(50) == pytest.approx(0.5)
    assert load.percentile(95) == pytest.approx(0.95)
    assert load.calls_per_s == pytest.approx(101 / meter.WINDOW_S)
    assert EngineLoad().percentile(50) is None
    assert EngineLoad(seconds=(3.0,)).percentile(95) == 3.0


def _decided(weights: dict[str, float], *chosen: str, **more: Any) -> GateDecided:
    return GateDecided("run-1", 0.0, "rules", weights, (chosen,) if chosen else (), 2, 0.001, **more)


def test_the_load_of_a_gate_is_told_in_the_papers_units() -> None:
    meter = Meter()
    for event in (
        _decided({"a": 3.0, "b": 1.0, "c": 9.0}, "a", "b"),
        _decided({"a": 1.0}, "a"),
        _decided({}, "a", "b", "c", failed="too slow"),
        _decided({"c": 1.0}, alone="c"),
        _decided({"a": 1.0}),  # it had the answer already
    ):
        meter.add(event)
    load = meter.gate().among("abcd")
    assert (load.requests, load.failed) == (4, 1)
    assert load.importance == {"a": 1.75, "b": 0.25, "c": 1.0, "d": 0.0} and load.load == {
        "a": 2,
        "b": 1,
        "c": 1,
        "d": 0,
    }
    assert load.max_over_mean_load == 2.0
    assert load.cv_load == pytest.approx(0.5**0.5) and load.cv_importance == pytest.approx((1.875 / 4) ** 0.5 / 0.75)


def test_a_gate_that_decided_nothing_has_no_load() -> None:
    load = GateLoad().among("ab")
    assert (load.cv_load, load.max_over_mean_load, load.load) == (0.0, 0.0, {"a": 0, "b": 0})


def test_what_a_gate_did_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Meter()
    watched.add(_decided({"a": 1.0}, "a"))
    monkeypatch.setattr(meter, "WINDOW_S", -1.0)
    assert watched.gate() == GateLoad()
