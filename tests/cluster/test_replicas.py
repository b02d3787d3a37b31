"""Which replica gets a call: the arithmetic, and on real Serve."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import ReplicaID

from moa_ray.cluster import Session
from moa_ray.cluster.app import deployment_of, router_of
from moa_ray.cluster.deploy import deploy
from moa_ray.cluster.engine_actor import HandleEngine
from moa_ray.cluster.gateway import RouterBackend
from moa_ray.cluster.replicas import ReplicaRouter, ranked
from moa_ray.cluster.session import details_of
from moa_ray.engines import EngineRequest
from moa_ray.graph import Message, from_dict
from moa_ray.runtime import RunOptions, RunResult
from tests.conftest import until

LOADS = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(0, 20), min_size=1, max_size=8)


@given(st.text(), LOADS)
def test_the_best_replica_of_a_key_is_the_same_while_none_has_more_than_its_share(
    key: str, loads: dict[str, int]
) -> None:
    idle = dict.fromkeys(loads, 0)
    best, *rest = ranked(key, idle)
    assert ranked(key, dict(reversed(idle.items()))) == [best, *rest]
    assert ranked(key, {name: 0 for name in idle if name != rest[0]} if rest else idle)[0] == best
    if rest:
        assert ranked(key, {name: 0 for name in idle if name != best}) == rest


@given(st.text(), LOADS)
def test_a_replica_with_much_more_to_do_comes_after_all_others(key: str, loads: dict[str, int]) -> None:
    order, mean = ranked(key, loads), sum(loads.values()) / len(loads)
    over = [loads[name] > min(loads.values()) + max(2, mean / 4) for name in order]
    assert sorted(order) == sorted(loads) and over == sorted(over) and not over[0]


@pytest.mark.parametrize(("calls", "least"), [(12, 2), (120, 30)])
def test_calls_of_one_key_at_once_keep_every_replica_busy(calls: int, least: int) -> None:
    ongoing = dict.fromkeys("abc", 0)
    for _ in range(calls):
        ongoing[ranked("key", ongoing)[0]] += 1
    assert min(ongoing.values()) >= least


def test_keys_spread_evenly() -> None:
    names = dict.fromkeys("abcd", 0)
    found = Counter(ranked(f"key {n}", names)[0] for n in range(4000))
    assert min(found.values()) > 900


async def test_a_replica_whose_calls_are_over_is_chosen_whatever_it_said_of_itself_and_when_that_came() -> None:
    deployment = DeploymentID("engine", "app")
    router = ReplicaRouter(deployment, DeploymentHandleSource.UNKNOWN, use_replica_queue_len_cache=True)
    all_of_them = [SimpleNamespace(replica_id=ReplicaID(name, deployment)) for name in "abc"]
    call = SimpleNamespace(args=(EngineRequest("x", (), affinity="key"),), routing_context=SimpleNamespace())

    async def chosen() -> ReplicaID:
        found: ReplicaID = (await router.choose_replicas(all_of_them, call))[0][0].replica_id
        return found

    best = await chosen()
    for _ in range(4):
        router.on_send_request(best)
    assert await chosen() != best
    for _ in range(4):
        router.on_request_completed(best, "call")
        router.decrement_queue_len_cache(best)
    router.on_new_queue_len_info(best, 4)  # what it said when it took the last of them
    assert await chosen() == best


# ---------------------------------------------------------------- on Serve

APP = "replicas"
GRAPH = {
    "version": 1,
    "name": "panel",
    "engines": {
        "many": {"kind": "scripted", "model": "m", "replicas": 3, "faults": [{"agent": "stuck", "kind": "hang"}]},
        "one": {"kind": "scripted", "model": "m"},
    },
    "agents": {name: {"engine": "many"} for name in ("stuck", "a", "b", "c")} | {"chief": {"engine": "one"}},
    "layers": [["stuck", "a", "b", "c"]],
    "aggregator": "chief",
    "policy": {"quorum": 3, "grace_s": 0, "deadline_s": 60},
}
SLOW = {"kind": "scripted", "model": "m", "replicas": 3, "concurrency": 2, "ttft_s": 0.1}


@pytest.fixture(scope="module")
def engine(ray_cluster: None) -> Iterator[HandleEngine]:
    with Session():
        deploy([from_dict(GRAPH)], APP)
        yield HandleEngine("many", serve.get_deployment_handle(deployment_of("panel", "many"), APP))
        serve.delete(APP)


async def replica_of(engine: HandleEngine, **request: Any) -> str:
    messages: tuple[Message, ...] = ({"role": "user", "content": "why?"},)
    chunks = [chunk async for chunk in engine.stream(EngineRequest("x", messages, agent="a", **request))]
    return chunks[0].replica


serving = pytest.mark.xdist_group("ray")


@serving
async def test_a_call_never_goes_to_a_replica_that_it_avoids_while_there_are_others(engine: HandleEngine) -> None:
    names = {await replica_of(engine, affinity=f"key {n}") for n in range(40)}
    assert len(names) == 3
    for wanted in names:
        for affinity in ("", "key"):
            asked = [replica_of(engine, avoid=frozenset(names - {wanted}), affinity=affinity) for _ in range(8)]
            assert set(await asyncio.gather(*asked)) == {wanted}
    assert await replica_of(engine, avoid=frozenset(names)) in names


@serving
async def test_calls_of_one_router_at_once_do_not_wait_for_each_other(engine: HandleEngine) -> None:
    backend = RouterBackend({"panel": serve.get_deployment_handle(router_of("panel"), APP)})
    for _ in range(5):
        batches = backend.stream("panel", [{"role": "user", "content": "why?"}], RunOptions())
        result = RunResult.of([event async for batch in batches for event in batch])
        assert {r.call: r.state for r in result.agents} == {
            "1/stuck": "cancelled",
            **dict.fromkeys(("1/a", "1/b", "1/c", "answer"), "finished"),
        }


@serving
async def test_no_replica_stands_idle_while_others_have_a_queue(ray_cluster: None) -> None:
    graph = {"engines": {"few": SLOW}, "agents": {"a": {"engine": "few"}}, "layers": [["a"]], "aggregator": "a"}
    with Session():
        deploy([from_dict({"version": 1, "name": "queue", **graph})], "queue")
        engine = HandleEngine("few", serve.get_deployment_handle(deployment_of("queue", "few"), "queue"))

        async def caller() -> Counter[str]:
            return Counter([await replica_of(engine, affinity="of all") for _ in range(25)])

        for_each = sum(await asyncio.gather(*(caller() for _ in range(12))), Counter[str]())
        serve.delete("queue")
    assert len(for_each) == 3 and min(for_each.values()) > 60, for_each


@serving
async def test_turns_of_a_conversation_find_their_beginning_in_the_cache(engine: HandleEngine) -> None:
    backend = RouterBackend({"panel": serve.get_deployment_handle(router_of("panel"), APP)})
    for number in range(6):
        history: list[Message] = []
        before = 0
        for turn in range(3):
            history.append({"role": "user", "content": f"question {turn} of conversation {number} " * 5})
            batches = backend.stream("panel", history, RunOptions(agent="a"))
            result = RunResult.of([event async for batch in batches for event in batch])
            (record,) = result.agents
            assert record.usage.cached_tokens >= before
            before = record.usage.prompt_tokens
            history.append({"role": "assistant", "content": result.text})


@serving
async def test_when_a_replica_dies_its_calls_move_to_one_other_and_come_back(engine: HandleEngine) -> None:
    home = await replica_of(engine, affinity="mine")
    (pid,) = (r["pid"] for r in _replicas() if r["replica_id"] == home)
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(until, lambda: not psutil.pid_exists(pid))
    await asyncio.to_thread(until, lambda: len(_replicas()) == 3 and home not in {r["replica_id"] for r in _replicas()})
    moved = [await replica_of(engine, affinity="mine") for _ in range(5)]
    assert len(set(moved)) == 1 and home not in moved


def _replicas() -> list[dict[str, Any]]:
    found = details_of(APP)["deployments"][deployment_of("panel", "many")]["replicas"]
    return [replica for replica in found if replica["state"] == "RUNNING"]
