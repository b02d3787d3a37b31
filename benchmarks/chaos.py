"""What failures cost: SIGKILL under load, a member that is slow, silent or broken, and ten times too many callers.

All engines are scripted, and number their tokens. Run: `python -m benchmarks.chaos WHAT`, which is `kills`, `leave`,
`members`, `node` or `overload`; `kills` takes the number of requests and a seed:
`python -m benchmarks.chaos kills 5000 1`.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx2
import psutil
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from benchmarks.serving import _PORT, _URL
from moa_ray import MoA
from moa_ray.client import AsyncClient, Delta
from moa_ray.cluster import Session, operate
from moa_ray.cluster.deploy import deploy
from moa_ray.cluster.session import Listen
from moa_ray.engines import Scripted, ScriptedOptions
from moa_ray.errors import MoARayError
from moa_ray.graph import Graph, from_dict
from moa_ray.runtime import AnswerDelta, Runner
from moa_ray.server import ServerSettings
from moa_ray.server.deployed import http

_TOKENS = 60
_ANSWER = "".join(f"{n} " for n in range(1, _TOKENS + 1))


def graph(policy: Mapping[str, Any], *, replicas: int = 1, **options: Any) -> Graph:
    """Three proposers and an aggregator, an engine each."""
    engine = {"kind": "scripted", "model": "m", "replicas": replicas, "reply_tokens": _TOKENS, **options}
    agents = ("a", "b", "c", "chief")
    return from_dict(
        {
            "version": 1,
            "name": "bench",
            "engines": {name: engine for name in agents},
            "agents": {name: {"engine": name} for name in agents},
            "layers": [["a", "b", "c"]],
            "aggregator": "chief",
            "policy": dict(policy),
        }
    )


# ---------------------------------------------------------------- kills


async def kills(requests: int, seed: int) -> None:
    """Every few seconds a replica of an engine, or the router, gets a SIGKILL."""
    spec = graph({"retries": 5, "deadline_s": 120}, replicas=2, ttft_s=0.05, itl_s=0.01)
    deploy([spec], "bench", http=http(ServerSettings()), route_prefix="/", may_grow=True)
    killed: Counter[str] = Counter()
    started = time.perf_counter()
    async with AsyncClient(f"{_URL}/v1", retries=0) as client:
        killer = asyncio.create_task(_kill(random.Random(seed), killed))
        found = await _asked(requests, lambda: client.stream("why?"))
        killer.cancel()
    seconds = time.perf_counter() - started
    print(f"{requests} streamed requests, 16 at once, {seconds:.0f} s, seed {seed}, {sum(killed.values())} SIGKILLs")
    print(f"  killed                             {dict(killed)}")
    _print_found(found)


def _print_found(found: Counter[str]) -> None:
    print(f"  whole answers                      {found['whole']}")
    print(f"  failed before the first token      {found['failed before']}   limit 0")
    print(f"  ended with an error after it       {found['failed after']}   (their router died)")
    print(f"  tokens missing, doubled, or wrong  {found['corrupted']}   limit 0")


async def _asked(requests: int, ask: Callable[[], AsyncIterator[Any]]) -> Counter[str]:
    """What became of so many requests, 16 at once."""
    found: Counter[str] = Counter()
    left = iter(range(requests))

    async def caller() -> None:
        for _ in left:
            found[await _judged(ask())] += 1

    await asyncio.gather(*(caller() for _ in range(16)))
    return found


async def _judged(events: AsyncIterator[Any]) -> str:
    """What became of an answer, by its events: the client's, or the runtime's."""
    text = ""
    try:
        async for event in events:
            if isinstance(event, (Delta, AnswerDelta)):
                text += event.text
    except MoARayError:
        if not text:
            return "failed before"
        return "failed after" if _ANSWER.startswith(text) else "corrupted"
    return "whole" if text == _ANSWER else "corrupted"


async def _kill(dice: random.Random, killed: Counter[str]) -> None:
    while True:
        await asyncio.sleep(dice.uniform(3, 7))
        processes = await asyncio.to_thread(_replicas)
        if processes:
            name, process = dice.choice(processes)
            with suppress(psutil.NoSuchProcess):
                process.kill()
                killed[name] += 1


def _replicas() -> list[tuple[str, psutil.Process]]:
    """Kind and process of each replica of an engine or the router."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = (process.cmdline() or [""])[0]
            kind = next((kind for kind in ("engine", "router") if f":{kind}.bench" in title), None)
            if kind is not None:
                found.append((kind, process))
    return found


# ---------------------------------------------------------------- a node


def node(requests: int = 200) -> None:
    """A whole node with half of the replicas dies under load; callers use the Python interface."""
    spec = graph({"retries": 5, "deadline_s": 120}, replicas=2, ttft_s=0.05, itl_s=0.01, resources={"num_gpus": 1})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 8})
    dies = cluster.add_node(num_cpus=8, num_gpus=8)
    try:
        with MoA(spec, address=cluster.address) as moa:
            actors = list_actors(filters=[("state", "=", "ALIVE"), ("node_id", "=", dies.node_id)], limit=1000)
            lost = Counter(actor.class_name.split(":")[-1] for actor in actors if "ServeReplica" in actor.class_name)

            async def load() -> Counter[str]:
                asking = asyncio.ensure_future(_asked(requests, lambda: moa.stream("why?")))
                await asyncio.sleep(2)
                await asyncio.to_thread(cluster.remove_node, dies, allow_graceful=False)
                return await asking

            found = asyncio.run(load())
    finally:
        cluster.shutdown()
    print(f"{requests} requests, 16 at once; after 2 s a node dies, with it {dict(lost)}")
    _print_found(found)


# ---------------------------------------------------------------- members

_GRACE_S = 0.2
_BAD: Mapping[str, dict[str, Any]] = {
    "none": {},
    "10 x slower": {"slowdown": {"a": 10.0}},
    "silent for ever": {"faults": [{"agent": "a", "kind": "hang"}]},
    "failing always": {"faults": [{"agent": "a", "kind": "unavailable"}]},
    "dying in mid-stream": {"faults": [{"agent": "a", "kind": "unavailable", "after_tokens": 20}]},
}


async def members(requests: int = 12) -> None:
    """One of three proposers is bad; a quorum of two, and a grace."""
    print(f"one bad proposer of three, quorum 2, grace {_GRACE_S} s, in process, p50 of {requests}")
    base_s = 0.0
    for name, bad in _BAD.items():
        spec = graph({"quorum": 2, "grace_s": _GRACE_S, "deadline_s": 60}, ttft_s=0.1, itl_s=0.005)
        engines = {}
        for engine, own in spec.engines.items():
            engines[engine] = Scripted(ScriptedOptions.model_validate({**own.options, **bad}))
        run = Runner(spec, engines)
        times = [(await run.run("why?")).total_s for _ in range(requests)]
        p50_s = statistics.median(times)
        base_s = base_s or p50_s
        asked = len(engines["a"].calls)
        print(
            f"  {name:<20} {p50_s:.3f} s, {p50_s / base_s:.2f} x (limit 1.1 and the grace: "
            f"{1.1 + _GRACE_S / base_s:.2f}), the bad one was asked {asked} times in {requests} requests"
        )


# ---------------------------------------------------------------- clients that leave


async def leave(callers: int = 16, rounds: int = 5) -> None:
    """Clients that hang up in the middle: how long until no engine works for them any more."""
    spec = graph({}, ttft_s=0.05, itl_s=0.01, reply_tokens=100_000)
    deploy([spec], "bench", http=http(ServerSettings()), route_prefix="/", may_grow=True)

    def ongoing() -> int:
        return sum(engine.load.ongoing for engine in operate.status("bench")[0].engines)

    async def until(wanted: int) -> None:
        async with asyncio.timeout(30):
            while await asyncio.to_thread(ongoing) != wanted:
                await asyncio.sleep(0.02)

    seconds = []
    for _ in range(rounds):
        async with AsyncClient(f"{_URL}/v1", retries=0) as client:
            asking = [asyncio.ensure_future(client.run("why?")) for _ in range(callers)]
            await until(3 * callers)
            for task in asking:
                task.cancel()
            left = time.perf_counter()
            await asyncio.gather(*asking, return_exceptions=True)
            await until(0)
            seconds.append(time.perf_counter() - left)
    print(f"{callers} clients leave in mid-stream, {rounds} times: all engines idle, counters at zero")
    print(f"  after {', '.join(f'{each:.2f} s' for each in seconds)}   limit 1 s")


# ---------------------------------------------------------------- overload


async def overload(seconds: float = 60.0) -> None:
    """Ten times as many callers as there are places."""
    places = 8
    spec = graph({}, ttft_s=0.2, itl_s=0.01)
    settings = ServerSettings(max_running=places, max_queued=places)
    deploy([spec], "bench", http=http(settings), route_prefix="/", may_grow=True)
    capacity, _, _ = await _load(places, 10)
    before = _gateway_mib()
    goodput, refusals, failed = await _load(10 * places, seconds)
    print(f"{10 * places} callers on {places} places and a queue of {places}, {seconds:.0f} s, whole answers")
    print(f"  goodput {goodput:.2f}/s of {capacity:.2f}/s without overload: {goodput / capacity:.2f} (at least 0.9)")
    seen_ms, inside_ms = (statistics.median(each) for each in zip(*refusals, strict=True))
    print(
        f"  {len(refusals)} refusals, p50 {inside_ms:.0f} ms in the gateway (limit 50), "
        f"{seen_ms:.0f} ms for callers on the same cores; {failed} other failures"
    )
    print(f"  memory of the gateway {before:.0f} MiB before, {_gateway_mib():.0f} MiB after")


async def _load(callers: int, seconds: float) -> tuple[float, list[tuple[float, float]], int]:
    """Answers a second; of each refusal the milliseconds, for its caller and in the gateway; other failures."""
    good, failed, refusals = 0, 0, []
    begun = time.perf_counter()
    body = {"model": "bench", "messages": [{"role": "user", "content": "why?"}]}
    unbounded = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=_URL, timeout=60, limits=unbounded) as client:

        async def caller() -> None:
            nonlocal good, failed
            while (asked := time.perf_counter()) < begun + seconds:
                response = await client.post("/v1/chat/completions", json=body)
                if response.status_code == 429:
                    inside_ms = float(response.headers["openai-processing-ms"])
                    refusals.append(((time.perf_counter() - asked) * 1e3, inside_ms))
                    await asyncio.sleep(0.5)  # less than the server asks for
                elif response.is_success:
                    good += 1
                else:
                    failed += 1

        await asyncio.gather(*(caller() for _ in range(callers)))
    return good / (time.perf_counter() - begun), refusals, failed


def _gateway_mib() -> float:
    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "bench:gateway" in (process.cmdline() or [""])[0]:
                total += process.memory_info().rss
    return total / 2**20


def main(arguments: Sequence[str]) -> None:
    wanted, *numbers = arguments or ["members"]
    if wanted == "members":
        asyncio.run(members())
        return
    if wanted == "node":
        node()
        return
    requests, seed = (int(number) for number in [*numbers, *("5000", "1")[len(numbers) :]])
    served: Mapping[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "kills": lambda: kills(requests, seed),
        "leave": leave,
        "overload": overload,
    }
    measure = served[wanted]
    session = Session("local", Listen(port=_PORT))
    try:
        asyncio.run(measure())
    finally:
        session.close()


if __name__ == "__main__":
    main(sys.argv[1:])
