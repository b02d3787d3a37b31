"""What HTTP, gateway, router and engine hops add, under one caller and under fifty; and what scaling an engine brings.

Peer of the overhead: the same calls made by hand with `AsyncOpenAI`, each engine a Serve deployment with an HTTP
ingress of its own. Peers of the CPU: what clients alone spend that make these calls by hand, with `AsyncOpenAI` and,
where it is installed (`pip install together`), with the SDK that Together's own Mixture-of-Agents scripts use. All
engines are scripted. Run: `python -m benchmarks.serving`.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import openai
import psutil
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

from benchmarks.orchestration import graph, p50_s
from moa_ray.cluster import Session, operate
from moa_ray.cluster.deploy import deploy
from moa_ray.cluster.session import Listen
from moa_ray.engines import EngineRequest, Scripted, ScriptedOptions
from moa_ray.graph import Graph, from_dict
from moa_ray.server import ServerSettings
from moa_ray.server.deployed import http

_PORT = 8731
_URL = f"http://127.0.0.1:{_PORT}"
_WHY: Any = [{"role": "user", "content": "why?"}]
_CALLERS, _ROUNDS, _TURNS = 50, 3, 3
_LIMIT_CPU = 2.0
"""Times what the best peer's client alone spends on the same calls."""


@contextmanager
def served(graph: Graph) -> Iterator[str]:
    """`graph` at the root; yields the base URL."""
    deploy([graph], "bench", http=http(ServerSettings()), route_prefix="/", may_grow=True)
    try:
        yield f"{_URL}/v1"
    finally:
        serve.delete("bench")


# ---------------------------------------------------------------- the peer


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
class Endpoint:
    """A scripted engine with an ingress of its own."""

    def __init__(self, options: ScriptedOptions) -> None:
        self._engine = Scripted(options)

    async def __call__(self, request: Request) -> Any:
        """Answer whatever the path, in one piece or streamed."""
        body = await request.json()
        call = EngineRequest("x", tuple(body["messages"]), agent=body["model"])
        head = {"id": "c", "created": 1, "model": body["model"]}
        if body.get("stream"):
            return StreamingResponse(self._events(call, head), media_type="text/event-stream")
        text = (await self._engine.complete(call)).text
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return {**head, "object": "chat.completion", "choices": [choice]}

    async def _events(self, call: EngineRequest, head: dict[str, Any]) -> AsyncGenerator[str, None]:
        async for chunk in self._engine.stream(call):
            choice = {"index": 0, "delta": {"content": chunk.text}, "finish_reason": chunk.finish_reason}
            yield f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"


Call = Callable[[], Coroutine[Any, Any, Any]]


_NAMES = ("a", "b", "c", "chief")


@contextmanager
def endpoints(options: dict[str, Any]) -> Iterator[None]:
    """The agents of `graph()`, each an endpoint of its own."""
    script = ScriptedOptions.model_validate(options)
    for name in _NAMES:
        serve.run(Endpoint.bind(script), name=name, route_prefix=f"/{name}")
    try:
        yield
    finally:
        for name in _NAMES:
            serve.delete(name)


def by_hand(layers: int, client: Callable[..., Any] = openai.AsyncOpenAI, *, stream: bool = False) -> tuple[Call, Call]:
    """Makes the calls of `graph(layers)` with a client an endpoint; and closes the clients.

    With `stream`, the answer is read as it comes.
    """
    clients = {name: client(base_url=f"{_URL}/{name}/v1", api_key="none") for name in _NAMES}

    async def ask(name: str, content: str, stream: bool = False) -> str:
        messages = [{"role": "user", "content": content}]
        answer = await clients[name].chat.completions.create(model=name, messages=messages, stream=stream)
        if stream:
            return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
        return answer.choices[0].message.content or ""

    async def once() -> str:
        content = "why?"
        for _ in range(layers):
            drafts = await asyncio.gather(*(ask(name, content) for name in _NAMES[:3]))
            content = "why?\n" + "\n".join(drafts)
        return await ask("chief", content, stream)

    async def close() -> None:
        for client in clients.values():
            await client.close()

    return once, close


# ---------------------------------------------------------------- measuring


def p50_ms(ask: Call, close: Call) -> float:
    """Median wall time of one call after another, in milliseconds."""
    with asyncio.Runner() as runner:
        median_ms = p50_s(lambda: runner.run(ask()), 100) * 1e3
        runner.run(close())
    return median_ms


def client_cpu_s(ask: Call, close: Call) -> float:
    """CPU seconds that this process spends on a call, `_CALLERS` of them at once."""

    async def rounds() -> float:
        await asyncio.gather(*(ask() for _ in range(_CALLERS)))
        before = time.process_time()
        for _ in range(_ROUNDS):
            await asyncio.gather(*(ask() for _ in range(_CALLERS)))
        used_s = time.process_time() - before
        await close()
        return used_s / (_CALLERS * _ROUNDS)

    with asyncio.Runner() as runner:
        return runner.run(rounds())


def cpu_s() -> float:
    """CPU seconds of all processes of the local cluster so far, this one left out."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


def _streamed(caller: openai.OpenAI) -> None:
    for _ in caller.chat.completions.create(model="bench", messages=_WHY, stream=True):
        pass


def _whole(caller: openai.OpenAI) -> None:
    caller.chat.completions.create(model="bench", messages=_WHY)


def many(
    url: str, ask: Callable[[openai.OpenAI], None], callers: int, rounds: int, spread_s: float = 0.0
) -> tuple[list[float], int]:
    """Seconds of each of `rounds` calls of `callers` callers at once, and how many failed.

    The callers start within `spread_s`: each is a person of their own, who does not ask in step with the others.
    """

    def one(number: int) -> tuple[list[float], int]:
        times, failed = [], 0
        time.sleep(spread_s * number / callers)
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as caller:
            for _ in range(rounds):
                started = time.perf_counter()
                try:
                    ask(caller)
                except openai.OpenAIError:
                    failed += 1
                times.append(time.perf_counter() - started)
        return times, failed

    with ThreadPoolExecutor(callers) as pool:
        found = list(pool.map(one, range(callers)))
    return [t for times, _ in found for t in times], sum(failed for _, failed in found)


def overhead() -> None:
    """One caller, engines of zero latency."""
    print("one caller, 3 + 1 calls, engines of zero latency, HTTP to HTTP, p50")
    with served(graph(1, reply="x")) as url:
        client = openai.AsyncOpenAI(base_url=url, api_key="none")
        ours = p50_ms(lambda: client.chat.completions.create(model="bench", messages=_WHY), client.close)
    with endpoints({"reply": "x"}):
        hand = p50_ms(*by_hand(1))
    print(f"  through moa-ray        {ours:6.1f} ms   limit 40 ms")
    print(f"  by hand, AsyncOpenAI   {hand:6.1f} ms   ratio {ours / hand:.2f}, limit 1.5")


def concurrent() -> None:
    """Fifty callers, engines as slow as real ones."""
    timed = {"ttft_s": 0.2, "itl_s": 0.01, "reply_tokens": 60}
    floor_s = 3 * (0.2 + 59 * 0.01)
    print(f"{_CALLERS} callers, 3 x 2 + 1 calls of 0.79 s, floor {floor_s:.2f} s")
    with served(graph(2, **timed)) as url, endpoints(timed):
        for name, ask in {"whole": _whole, "streamed": _streamed}.items():
            _loaded(f"{name}, begun in one moment", url, ask, 1, 0.0, floor_s)
            spent_s: dict[str, list[float]] = {}
            for _ in range(_TURNS):  # in turns, as the machine is not always as fast
                ours_s = _loaded(f"{name}, begun one by one", url, ask, _ROUNDS, floor_s, floor_s)
                spent_s.setdefault("moa-ray", []).append(ours_s)
                for peer, client in _peers().items():
                    calls = by_hand(2, client, stream=name == "streamed")
                    spent_s.setdefault(peer, []).append(client_cpu_s(*calls))
            mean_s = {who: statistics.fmean(each) for who, each in spent_s.items()}
            ours_s = mean_s.pop("moa-ray")
            alone = ", ".join(f"{peer} {each_s * 1e3:.0f} ms" for peer, each_s in mean_s.items())
            print(
                f"  {name}: {ours_s * 1e3:.0f} ms of CPU a request in all of ours; "
                f"by hand, in the client alone: {alone}; "
                f"ratio to the best {ours_s / min(mean_s.values()):.2f} (limit {_LIMIT_CPU})"
            )


def _loaded(
    what: str, url: str, ask: Callable[[openai.OpenAI], None], rounds: int, spread_s: float, floor_s: float
) -> float:
    """CPU seconds that all of ours spend on a request under `_CALLERS` callers; prints how long a request takes."""
    before = cpu_s()
    times, failed = many(url, ask, _CALLERS, rounds, spread_s)
    used_s = cpu_s() - before
    p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
    print(f"  {what}: p50 {p50 / floor_s:.2f} x floor, p99/p50 {p99 / p50:.2f} (limit 1.3), {failed} failed")
    return used_s / len(times)


def _peers() -> dict[str, Callable[..., Any]]:
    peers: dict[str, Callable[..., Any]] = {"AsyncOpenAI": openai.AsyncOpenAI}
    if find_spec("together"):
        peers["AsyncTogether"] = import_module("together").AsyncTogether
    return peers


def scaling() -> None:
    """From one replica to three."""
    slow = {"kind": "scripted", "model": "m", "ttft_s": 0.2, "concurrency": 2}
    bound = from_dict(
        {
            "version": 1,
            "name": "bench",
            "engines": {"slow": slow, "fast": {"kind": "scripted", "model": "m", "reply": "x"}},
            "agents": {"a": {"engine": "slow"}, "chief": {"engine": "fast"}},
            "layers": [["a"]],
            "aggregator": "chief",
        }
    )
    with served(bound) as url:
        rates = []
        for replicas in (1, 3):
            operate.scale("bench", {"slow": replicas})
            many(url, _whole, 12, 2)
            started = time.perf_counter()
            times, failed = many(url, _whole, 12, 10 * replicas)
            rates.append((len(times) - failed) / (time.perf_counter() - started))
    print("an engine of 2 calls at once, 0.2 s each, 12 callers")
    print(
        f"  1 replica {rates[0]:.1f}/s, 3 replicas {rates[1]:.1f}/s: x {rates[1] / rates[0]:.2f}, at least 2.4 wanted"
    )


def main() -> None:
    """All of them, each on a local cluster of its own, so that none bears what another left."""
    for measure in (overhead, concurrent, scaling):
        session = Session("local", Listen(port=_PORT))
        try:
            measure()
        finally:
            session.close()


if __name__ == "__main__":
    main()
