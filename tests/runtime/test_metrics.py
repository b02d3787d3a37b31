from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from moa_ray.engines import Chunk, EngineRequest, Scripted, ScriptedOptions, Usage
from moa_ray.engines.scripted import Fault
from moa_ray.graph import from_dict
from moa_ray.runtime import AgentDelta, Ledger, RunMetrics, Runner, RunOptions
from moa_ray.runtime.metrics import Add
from tests.runtime.panels import panel


class Kept:
    """Keeps every value that was told, by the metric and its labels."""

    def __init__(self) -> None:
        self.told: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)

    def counter(self, name: str, help: str, labels: Sequence[str]) -> Add:
        def add(value: float, *values: str) -> None:
            assert len(values) == len(labels)
            self.told[name, *values].append(value)

        return add

    def histogram(self, name: str, help: str, labels: Sequence[str], buckets: Sequence[float]) -> Add:
        return self.counter(name, help, labels)

    def sum(self, name: str, *labels: str) -> float:
        return sum(self.told["moa_ray_" + name, *labels])


async def test_what_failed_is_told_of_the_engine_that_failed_and_not_of_the_one_that_stood_in() -> None:
    engines = {"weak": {"kind": "scripted", "model": "m"}, "firm": {"kind": "scripted", "model": "m"}}
    agents = {"a": {"engine": "weak", "fallbacks": ["firm"]}, "chief": {"engine": "firm"}}
    spec = {"version": 1, "name": "g", "engines": engines, "agents": agents, "layers": [["a"]], "aggregator": "chief"}
    fault = Fault(agent="a")
    running = {"weak": Scripted(ScriptedOptions(faults=(fault,))), "firm": Scripted(ScriptedOptions())}
    kept, _ = await told_of(Runner(from_dict({**spec, "policy": {"retries": 1}}), running))
    assert kept.sum("repeats", "m", "1", "a", "weak", "retries") == 2
    assert kept.sum("repeats", "m", "1", "a", "firm", "retries") == 0
    assert kept.sum("calls", "m", "1", "a", "firm", "finished") == 1


async def test_what_is_cut_off_when_the_caller_leaves_is_in_the_account() -> None:
    run, _ = panel(2, itl_s=0.005, reply_tokens=1000, price={"prompt": 0, "completion": 1})
    kept = Kept()
    options = RunOptions(draft_flush_s=0)
    batches = run.batches("why?", options, lambda ledger: RunMetrics(kept).add("m", ledger))
    async with aclosing(batches):
        async for batch in batches:
            if any(isinstance(event, AgentDelta) and event.agent == "a2" for event in batch):
                break
    assert kept.sum("runs", "m", "left") == 1
    assert kept.sum("calls", "m", "1", "a1", "script", "cancelled") == 1
    assert kept.sum("tokens", "m", "1", "a2", "script", "completion") > 0
    assert kept.sum("dollars", "m", "1", "a2", "script") > 0


async def test_an_answer_that_came_whole_has_no_inter_token_latency() -> None:
    class Whole(Scripted):
        async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
            yield Chunk("all at once", tokens=3)
            yield Chunk(finish_reason="stop", usage=Usage(5, 3))

    run, _ = panel(1)
    kept, ledger = await told_of(Runner(run.graph, {"script": Whole(ScriptedOptions())}))
    assert [record.itl_s for record in ledger.records] == [None, None]
    assert not any(key[0] == "moa_ray_itl_seconds" for key in kept.told)


async def told_of(run: Runner, options: RunOptions | None = None, *, leaves: bool = False) -> tuple[Kept, Ledger]:
    kept, ledger = Kept(), Ledger()
    async for event in run.stream("why?", options):
        ledger.add(event)
        if leaves:
            break
    RunMetrics(kept).add("m", ledger)
    return kept, ledger


async def test_calls_and_tokens_are_told_by_layer_agent_and_engine() -> None:
    run, _ = panel(2, 1, reply_tokens=10, itl_s=0.001)
    kept, ledger = await told_of(run)
    assert kept.sum("runs", "m", "finished") == kept.sum("calls", "m", "2", "a1", "script", "finished") == 1
    assert kept.sum("tokens", "m", "1", "a1", "script", "completion") == 10
    everything = [value for key, values in kept.told.items() if key[0] == "moa_ray_tokens" for value in values]
    assert sum(everything) == ledger.usage.prompt_tokens + ledger.usage.cached_tokens + ledger.usage.completion_tokens
    assert kept.sum("itl_seconds", "m", "1", "a1", "script") >= 0.001
    assert kept.sum("call_seconds", "m", "3", "chief", "script") >= 9 * 0.001


async def test_a_run_that_its_caller_left_and_one_that_never_began() -> None:
    run, _ = panel(2, itl_s=0.01, reply_tokens=100)
    kept, _ = await told_of(run, leaves=True)
    assert kept.sum("runs", "m", "left") == 1
    RunMetrics(never := Kept()).add("m", Ledger())
    assert not never.told


@pytest.mark.parametrize(("cached", "of_cached"), [(None, 1.0), (0.5, 0.5)])
async def test_dollars_are_the_tokens_times_the_price_prefill_ahead_and_failures_included(
    cached: float | None, of_cached: float
) -> None:
    price = {"prompt": 1.0, "completion": 3.0} | ({} if cached is None else {"cached": cached})
    policy = {"streaming": "overlap", "retries": 1}
    faults = [{"agent": "a1", "kind": "unavailable", "times": 1, "after_tokens": 4}]
    run, _ = panel(
        3, 2, spec={"policy": policy, "prompt": "woven"}, price=price, reply_tokens=30, itl_s=0.002, faults=faults
    )
    result = await run.run("why?")
    usage = result.usage
    fresh = usage.prompt_tokens - usage.cached_tokens
    expected = (fresh * 1.0 + usage.cached_tokens * of_cached + usage.completion_tokens * 3.0) / 1e6
    assert result.dollars == pytest.approx(expected) and usage.cached_tokens > 0
    assert sum(call.dollars or 0 for call in result.agents) == pytest.approx(expected)
    assert any(call.retries for call in result.agents) and any(call.warmed.prompt_tokens for call in result.agents)


async def test_without_a_price_nothing_is_said_of_dollars() -> None:
    run, _ = panel(2)
    kept, ledger = await told_of(run)
    assert ledger.dollars is None and all(record.dollars is None for record in ledger.records)
    assert not any(key[0] == "moa_ray_dollars" for key in kept.told)


async def test_dollars_of_a_run_reach_the_metrics() -> None:
    run, _ = panel(2, price={"prompt": 2.0, "completion": 4.0})
    kept, ledger = await told_of(run)
    told = sum(value for key, values in kept.told.items() if key[0] == "moa_ray_dollars" for value in values)
    assert told == pytest.approx(ledger.dollars)
