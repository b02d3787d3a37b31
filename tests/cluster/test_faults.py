"""SIGKILL of real replicas: an answer goes on where it broke off, and one of which nothing was seen begins anew."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import psutil
import pytest
from ray import serve

from moa_ray import MoA
from moa_ray.cluster import Session
from moa_ray.cluster.app import router_of
from moa_ray.cluster.deploy import deploy
from moa_ray.cluster.gateway import RouterBackend
from moa_ray.cluster.session import details_of
from moa_ray.errors import ClusterError
from moa_ray.graph import from_dict
from moa_ray.runtime import AgentStarted, AnswerDelta, Event, RunOptions, RunResult, RunStarted
from tests.conftest import until

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]

TOKENS = 60
APP = "faults"
GRAPH: dict[str, Any] = {
    "version": 1,
    "name": "panel",
    "engines": {
        name: {"kind": "scripted", "model": "m", "replicas": 2, "ttft_s": 0.05, "itl_s": 0.01, "reply_tokens": TOKENS}
        for name in ("one", "two")
    },
    "agents": {"a1": {"engine": "one"}, "a2": {"engine": "one"}, "chief": {"engine": "two"}},
    "layers": [["a1", "a2"]],
    "aggregator": "chief",
    "policy": {"retries": 5, "deadline_s": 120},
}
NUMBERS = [str(n) for n in range(1, TOKENS + 1)]


@pytest.fixture(scope="module")
def backend(ray_cluster: None) -> Iterator[RouterBackend]:
    with Session():
        deploy([from_dict(GRAPH)], APP)
        yield RouterBackend({"panel": serve.get_deployment_handle(router_of("panel"), APP)})
        serve.delete(APP)


def pids(deployment: str, app: str = APP) -> list[int]:
    """Processes of the deployment's actors that live."""
    found = details_of(app)["deployments"][deployment]["replicas"]
    return [r["pid"] for r in found if r["state"] == "RUNNING" and psutil.pid_exists(r["pid"])]


async def events_of(backend: RouterBackend, options: RunOptions | None = None) -> AsyncGenerator[Event, None]:
    async for batch in backend.stream("panel", [{"role": "user", "content": "why?"}], options or RunOptions()):
        for event in batch:
            yield event


async def test_an_answer_whose_replicas_are_killed_goes_on_without_a_gap(backend: RouterBackend) -> None:
    events = []
    async for event in events_of(backend, RunOptions(answer_flush_s=0)):
        events.append(event)
        if sum(isinstance(e, AnswerDelta) for e in events) == 5:
            for pid in await asyncio.to_thread(pids, "engine.panel.two"):  # one of them answers
                os.kill(pid, signal.SIGKILL)
    assert RunResult.of(events).text.split() == NUMBERS
    assert any(isinstance(event, AgentStarted) and event.continued for event in events)
    await asyncio.to_thread(until, lambda: len(pids("engine.panel.two")) == 2, within_s=60)


def test_what_a_call_had_written_before_a_quorum_cut_it_off_is_in_the_account(ray_cluster: None) -> None:
    one = GRAPH["engines"]["one"] | {"reply_tokens": 100, "slowdown": {"a1": 10.0}}
    policy = {"quorum": 1, "grace_s": 0.5, "deadline_s": 60}
    with MoA(from_dict(GRAPH | {"engines": GRAPH["engines"] | {"one": one}, "policy": policy})) as deployed:
        result = deployed.run("why?")
    cut, whole = sorted(result.agents[:2], key=lambda record: record.agent)
    assert (cut.state, whole.state) == ("cancelled", "finished")
    assert 3 <= cut.usage.completion_tokens < whole.usage.completion_tokens == 100


@pytest.fixture(scope="module")
def moa(ray_cluster: None) -> Iterator[MoA]:
    late = GRAPH["engines"]["two"] | {"ttft_s": 2.0}  # time to kill the router before the answer begins
    with MoA(from_dict(GRAPH | {"engines": GRAPH["engines"] | {"two": late}})) as deployed:
        yield deployed


def router_kill(moa: MoA) -> Callable[[], None]:
    """What kills the router that `moa` has now."""
    router = router_of("panel")
    until(lambda: len(pids(router, moa.app)) == 1, within_s=60)
    (pid,) = pids(router, moa.app)
    return lambda: os.kill(pid, signal.SIGKILL)


def test_a_router_that_dies_before_the_answer_costs_a_caller_without_a_gateway_nothing(moa: MoA) -> None:
    kill, events = router_kill(moa), []
    for event in moa.events("why?"):
        events.append(event)
        if sum(isinstance(e, AgentStarted) for e in events) == 1 and isinstance(event, AgentStarted):
            kill()
    assert RunResult.of(events).text.split() == NUMBERS
    assert sum(isinstance(event, RunStarted) for event in events) == 2


async def test_the_same_holds_for_callers_with_an_event_loop(moa: MoA) -> None:
    kill, events = await asyncio.to_thread(router_kill, moa), []
    async for event in moa.stream("why?"):
        events.append(event)
        if sum(isinstance(e, AgentStarted) for e in events) == 1 and isinstance(event, AgentStarted):
            kill()
    assert RunResult.of(events).text.split() == NUMBERS
    assert sum(isinstance(event, RunStarted) for event in events) == 2


def test_an_answer_whose_router_dies_ends_in_an_error(moa: MoA) -> None:
    kill, seen = router_kill(moa), []
    with pytest.raises(ClusterError, match="the router failed"):
        for event in moa.events("why?", RunOptions(answer_flush_s=0)):
            seen.append(event)
            if sum(isinstance(e, AnswerDelta) for e in seen) == 1 and isinstance(event, AnswerDelta):
                kill()
    assert sum(isinstance(event, RunStarted) for event in seen) == 1
