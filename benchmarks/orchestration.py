"""What moa-ray adds to the engines' own time: in process, and through Ray Serve.

Floor: the critical path of the graph, the sum over its layers of one engine call (they are all equally
fast here). Run: `python -m benchmarks.orchestration`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from moa_ray import MoA
from moa_ray.engines import Scripted, ScriptedOptions
from moa_ray.graph import Graph, from_dict
from moa_ray.runtime import Runner, RunResult

_TTFT_S, _ITL_S, _TOKENS = 0.2, 0.01, 60


def graph(layers: int, **options: Any) -> Graph:
    """`layers` layers of three proposers and an aggregator, an engine each."""
    agents = ("a", "b", "c", "chief")
    engine = {"kind": "scripted", "model": "script", **options}
    return from_dict(
        {
            "version": 1,
            "name": "bench",
            "agents": {name: {"engine": engine} for name in agents},
            "layers": [["a", "b", "c"]] * layers,
            "aggregator": "chief",
        }
    )


def runner(graph: Graph) -> Runner:
    """Runs requests in this process."""
    engines = {name: Scripted(ScriptedOptions.model_validate(spec.options)) for name, spec in graph.engines.items()}
    return Runner(graph, engines)


def in_process(graph: Graph) -> Callable[[], RunResult]:
    """A function that runs one request in this process."""
    running = runner(graph)
    loop = asyncio.new_event_loop()
    return lambda: loop.run_until_complete(running.run("why?"))


def p50_s(ask: Callable[[], object], repeats: int) -> float:
    """Median wall time of `ask`, after two unmeasured calls."""
    ask(), ask()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        ask()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    timed: Mapping[str, Any] = {"ttft_s": _TTFT_S, "itl_s": _ITL_S, "reply_tokens": _TOKENS}
    floor_s = 3 * (_TTFT_S + (_TOKENS - 1) * _ITL_S)
    panel, two_layers, slow = graph(1, reply="x"), graph(2, reply="x"), graph(2, **timed)
    print(f"critical path of 3 x 2 + aggregator, {_TTFT_S} s + {_TOKENS} x {_ITL_S} s a call: floor {floor_s:.2f} s")
    print(f"  in process             {p50_s(in_process(slow), 3) / floor_s:6.3f} x the floor")
    with MoA(slow) as moa:
        print(f"  through Ray Serve      {p50_s(lambda: moa.run('why?'), 3) / floor_s:6.3f} x the floor")
    print("overhead of one request, engines of zero latency, p50")
    print(f"  3 + 1 in process       {p50_s(in_process(panel), 200) * 1e3:6.2f} ms")
    print(f"  3 x 2 + 1 in process   {p50_s(in_process(two_layers), 200) * 1e3:6.2f} ms")
    for name, spec in (("3 + 1", panel), ("3 x 2 + 1", two_layers)):
        with MoA(spec) as moa:
            print(f"  {name + ' through Ray Serve':<22} {p50_s(lambda: moa.run('why?'), 100) * 1e3:6.2f} ms")


if __name__ == "__main__":
    main()
