from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from moa_ray import MoA
from moa_ray.errors import ClusterError, EngineRefused, QuorumNotMet, RequestError, ResourcesShort, SpecError
from moa_ray.graph import Graph, from_dict
from moa_ray.runtime import AgentDelta, AgentStarted, RunFinished, RunOptions
from tests.conftest import until

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]


def graph(engine: dict[str, Any] | None = None, **spec: Any) -> Graph:
    script = {"kind": "scripted", "model": "script", **(engine or {})}
    return from_dict(
        {
            "version": 1,
            "name": "panel",
            "engines": {"script": script},
            "agents": {name: {"engine": "script"} for name in ("a1", "a2", "a3", "chief")},
            "layers": [["a1", "a2", "a3"]],
            "aggregator": "chief",
            **spec,
        }
    )


@pytest.fixture(scope="module")
def moa() -> Iterator[MoA]:
    faults = [{"agent": "a1", "kind": "refused"}]
    with MoA(graph({"reply": "{agent} says {prompt}", "faults": faults, "itl_s": 0.001})) as deployed:
        yield deployed


def test_a_run_through_actors_gives_the_answer_and_every_agents_account(moa: MoA) -> None:
    result = moa.run("why?")
    assert result.text.startswith("chief says why?")
    assert {r.agent: r.state for r in result.agents} == {
        "a1": "failed",
        "a2": "finished",
        "a3": "finished",
        "chief": "finished",
    }
    assert "scripted fault: refused" in next(r for r in result.agents if r.agent == "a1").error
    assert result.ttft_s is not None and 0 < result.ttft_s <= result.total_s


def test_what_runs_add_up_to_is_among_rays_own_metrics(moa: MoA) -> None:
    moa.run("why?")
    whose = {"application": moa.app, "deployment": "router.panel", "model": "panel", "layer": "1", "agent": "a2"}
    wanted = {**whose, "engine": "script", "kind": "completion"}

    def told() -> bool:
        (port,) = (node["MetricsExportPort"] for node in ray.nodes() if node["Alive"])
        families = text_string_to_metric_families(httpx2.get(f"http://127.0.0.1:{port}/metrics").text)
        samples = [sample for family in families if family.name == "ray_moa_ray_tokens" for sample in family.samples]
        return any(wanted.items() <= sample.labels.items() and sample.value > 0 for sample in samples)

    until(told, within_s=60)  # each process tells its node every few seconds


def test_a_later_question_sees_the_conversation(moa: MoA) -> None:
    result = moa.run(
        [
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "answer"},
            {"role": "user", "content": "second"},
        ]
    )
    assert result.text.startswith("chief says second")


async def test_the_stream_brings_drafts_as_fine_as_the_reader_wants(moa: MoA) -> None:
    fine = [event async for event in moa.stream("one two three", RunOptions(draft_flush_s=0))]
    coarse = [event async for event in moa.stream("one two three")]
    assert sum(isinstance(event, AgentDelta) for event in fine) >= 8
    assert not any(isinstance(event, AgentDelta) for event in coarse)
    for events in (fine, coarse):
        assert isinstance(events[-1], RunFinished)


async def test_many_runs_at_once_do_not_mix(moa: MoA) -> None:
    async def last(question: str) -> str:
        *_, end = [event async for event in moa.stream(question)]
        assert isinstance(end, RunFinished)
        return end.text

    answers = await asyncio.gather(*(last(f"question {n}?") for n in range(10)))
    assert all(answer.startswith(f"chief says question {n}?") for n, answer in enumerate(answers))


def test_an_empty_prompt_is_refused_at_once(moa: MoA) -> None:
    with pytest.raises(RequestError):
        moa.run(" ")


def test_every_engine_is_an_actor_and_closing_takes_them_away() -> None:
    inline = {"kind": "scripted", "model": "m", "resources": {"num_gpus": 1}}
    names = ("a1", "a2", "a3", "chief")
    with MoA(graph(engines={}, agents={name: {"engine": inline} for name in names})) as moa:
        deployments = serve.status().applications[moa.app].deployments
        assert set(deployments) == {"router.panel", *(f"engine.panel.{name}" for name in names)}
        assert ray.available_resources().get("GPU") == 8 - len(names)
        moa.run("why?")
    assert moa.app not in serve.status().applications
    until(lambda: ray.available_resources().get("GPU") == 8)


def test_a_failure_of_the_run_reaches_the_caller_as_itself() -> None:
    with MoA(graph({"faults": [{"kind": "refused"}]})) as moa, pytest.raises(QuorumNotMet, match="0 of 3 agents"):
        moa.run("why?")
    with MoA(graph({"faults": [{"kind": "refused", "agent": "chief"}]})) as moa, pytest.raises(EngineRefused):
        moa.run("why?")


def test_closing_the_events_stops_the_engines() -> None:
    with MoA(graph({"itl_s": 0.01, "reply_tokens": 100_000, "concurrency": 4})) as moa:
        events = moa.events("why?")
        assert any(isinstance(event, AgentStarted) for event in events)
        events.close()
        # All four slots were taken for a quarter of an hour; only a real cancellation frees them.
        script = serve.get_deployment_handle("engine.panel.script", moa.app)
        stream: Any = script.options(method_name="stream", stream=True).remote(_request())
        try:
            assert next(chunk.text for chunk in stream if chunk.text) == "1 "
        finally:
            stream.cancel()


def _request() -> Any:
    from moa_ray.engines import EngineRequest

    return EngineRequest("x", ({"role": "user", "content": "why?"},), agent="chief")


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"num_gpus": 9}, r"engine 'script' needs 9 GPU for each replica; the cluster has 8"),
        ({"custom": {"tape": 1}}, r"engine 'script' needs 1 tape for each replica; the cluster has 0"),
    ],
)
def test_what_no_node_can_hold_is_told_by_resource_and_engine(
    resources: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moa_ray.cluster.deploy.PLACE_TIMEOUT_S", 2.0)
    before = set(serve.status().applications)
    with pytest.raises(ResourcesShort, match=message):
        MoA(graph({"resources": resources}))
    until(lambda: set(serve.status().applications) <= before)


def test_a_replica_that_holds_its_room_already_is_not_taken_for_one_that_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moa_ray.cluster.deploy.PLACE_TIMEOUT_S", 1.0)  # less than a process needs to start
    with MoA(graph({"resources": {"num_cpus": 2}})) as moa:  # all that the cluster has
        assert moa.run("why?").text


def test_an_engine_that_cannot_start_is_told_with_its_reason() -> None:
    bad = graph({"kind": "llamacpp", "model": "/nowhere/model.gguf"})
    with pytest.raises(ClusterError, match=r"engine 'script' did not start: .*/nowhere/model\.gguf") as caught:
        MoA(bad)
    assert caught.value.hint and "Traceback" not in str(caught.value)


def test_a_wrong_option_of_an_engine_is_told_before_anything_starts() -> None:
    with pytest.raises(SpecError, match="tfft_s"):
        MoA(graph({"tfft_s": 1}))


def test_an_address_that_nobody_serves_is_told_at_once() -> None:
    from moa_ray.cluster.session import _check_reachable

    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        _check_reachable("127.0.0.1:1")
    with pytest.raises(SpecError, match="no address of a Ray cluster"):
        _check_reachable("nonsense")
