"""Load in virtual time: what is sent when, and what a stall costs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
from collections import Counter
from collections.abc import AsyncGenerator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.engines.protocol import Chunk, Usage
from moa_ray.errors import EngineUnavailable
from moa_ray.evaluate import Figures, Objectives, Sample, arrivals, closed_loop, open_loop
from moa_ray.evaluate.figures import percentile
from moa_ray.graph import Message
from tests.runtime.virtual import simulate

PROMPT: tuple[Message, ...] = ({"role": "user", "content": "why?"},)


class Endpoint:
    """Answers of three tokens after 0.1 s, 0.01 s apart; nobody is answered before `stalled_until`."""

    def __init__(self, stalled_until: float = 0.0, fails: bool = False, hangs: bool = False) -> None:
        self.sent: list[float] = []
        self._stalled_until, self._fails, self._hangs = stalled_until, fails, hangs

    async def ask(self, prompt: tuple[Message, ...]) -> AsyncGenerator[Chunk, None]:
        clock = asyncio.get_running_loop().time
        self.sent.append(clock())
        if self._fails:
            raise EngineUnavailable("out of order")
        if self._hangs:
            await asyncio.sleep(1e6)
        await asyncio.sleep(max(0.1, self._stalled_until - clock()))
        for number in range(3):
            yield Chunk(f"{number} ", 1)
            await asyncio.sleep(0.01)
        yield Chunk(finish_reason="stop", usage=Usage(5, 3))


def loaded(endpoint: Endpoint, count: int, *, rate: float | None = None, callers: int = 1) -> Figures:
    """Figures of a load; with `rate` in an open loop of regular arrivals."""
    samples: list[Sample] = []

    async def run() -> float:
        prompts = [PROMPT] * count
        if rate is None:
            return await closed_loop(endpoint.ask, prompts, callers, timeout_s=60, ended=samples.append)
        times = [number / rate for number in range(count)]
        return await open_loop(endpoint.ask, prompts, times, timeout_s=60, ended=samples.append)

    return Figures(samples, simulate(run()))


def test_times_are_those_of_the_answer() -> None:
    told = loaded(Endpoint(), 4).to_json()
    assert told["mean_ttft_ms"] == pytest.approx(100) and told["p99_itl_ms"] == pytest.approx(10)
    assert told["mean_e2el_ms"] == pytest.approx(130) and told["mean_tpot_ms"] == pytest.approx(15)
    assert (told["completed"], told["failed"], told["total_input_tokens"], told["total_output_tokens"]) == (
        4,
        0,
        20,
        12,
    )
    assert told["duration"] == pytest.approx(4 * 0.13) and told["request_throughput"] == pytest.approx(1 / 0.13)


def test_a_closed_loop_has_so_many_requests_at_once() -> None:
    endpoint = Endpoint()
    figures = loaded(endpoint, 9, callers=3)
    assert figures.duration_s == pytest.approx(3 * 0.13)
    assert sorted(endpoint.sent)[2] - min(endpoint.sent) == 0 and sorted(endpoint.sent)[3] - min(endpoint.sent) > 0.1


def test_an_open_loop_counts_what_should_have_been_sent_during_a_stall() -> None:
    """Tene's example: a closed loop sends one request into the stall and sees one slow answer; all others look well."""
    closed, opened = loaded(Endpoint(10.0), 100).to_json(), loaded(Endpoint(10.0), 100, rate=5.0).to_json()
    assert closed["p95_ttft_ms"] == pytest.approx(100)
    assert opened["median_ttft_ms"] > 100 and opened["p95_ttft_ms"] > 9000


def test_what_fails_or_hangs_is_counted_by_kind_and_ends() -> None:
    assert loaded(Endpoint(fails=True), 3).to_json()["errors"] == {"EngineUnavailable": 3}
    told = loaded(Endpoint(hangs=True), 2).to_json()
    assert told["errors"] == {"EngineTimeout": 2} and told["completed"] == 0 and told["p99_ttft_ms"] is None
    assert told["duration"] == pytest.approx(120)


def test_requests_in_flight_when_the_load_is_stopped_are_counted() -> None:
    """Those are the slow ones: without them a load that is stopped in a stall looks well."""
    samples: list[Sample] = []

    async def run() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await closed_loop(Endpoint(hangs=True).ask, [PROMPT] * 9, 3, timeout_s=60, ended=samples.append)

    simulate(run())
    assert Counter(sample.error for sample in samples) == {"Interrupted": 3}
    assert [sample.e2el_s for sample in samples] == [pytest.approx(5)] * 3


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.sampled_from([50, 95, 99]))
def test_percentiles_are_those_of_numpy(values: list[float], percent: int) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_goodput_counts_requests_that_keep_every_objective() -> None:
    figures = loaded(Endpoint(0.4), 10)  # the first one waits for 0.4 s
    kept = Figures(figures.samples, 1.0, Objectives.of(["ttft:150", "e2el:200"])).to_json()
    assert kept["request_goodput"] == 9 and kept["request_throughput"] == 10
    assert Figures(figures.samples, 1.0, Objectives.of(["tpot:14"])).to_json()["request_goodput"] == 0
    assert figures.to_json()["request_goodput"] is None


@given(st.floats(0.1, 100), st.integers(1, 50), st.floats(0.1, 20), st.integers(0, 9))
def test_arrivals_begin_at_once_and_never_go_back(rate: float, count: int, burstiness: float, seed: int) -> None:
    times = arrivals(rate, count, burstiness=burstiness, seed=seed)
    assert len(times) == count and times[0] == 0 and times == sorted(times)
    assert times == arrivals(rate, count, burstiness=burstiness, seed=seed)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_have_their_rate_and_burstiness(burstiness: float) -> None:
    times = arrivals(5.0, 20_000, burstiness=burstiness)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.fmean(pauses) == pytest.approx(0.2, rel=0.05)
    variation = statistics.pstdev(pauses) / statistics.fmean(pauses)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)
