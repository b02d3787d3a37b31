from __future__ import annotations

import pytest

from moa_ray.engines import Usage
from moa_ray.runtime import AgentCancelled, AgentFailed, AgentFinished, AgentStarted, EngineLoad, Meter, meter

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
