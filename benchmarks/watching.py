"""What metrics, records and traces cost a request, beside the request itself.

`python -m benchmarks.watching [SECONDS]`: 3 proposers x 2 layers and an aggregator at zero latency, in process, with
the answer passed on in 40 pieces. The ways take turns, ten requests at a time. Told is the CPU of the request's own
thread, and of the whole process with the threads that write and send.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ray
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from benchmarks.orchestration import graph, runner
from moa_ray.cluster.ray_metrics import RayMetrics
from moa_ray.graph import Message, conversation
from moa_ray.runtime import RunMetrics, Runner, RunOptions, RunSpans
from moa_ray.runtime.records import Recorder
from moa_ray.server import ServerSettings
from moa_ray.server.edge import Admission
from moa_ray.server.metrics import Metrics
from moa_ray.server.runs import Choice

_QUESTION: list[Message] = conversation("Why is the sky blue?")
_BLOCK = 10


class Way:
    """How requests are watched: not at all."""

    def choice(self) -> Choice:
        """What a request is booked in."""
        return Choice()

    def ended(self, choice: Choice) -> None:
        """A request is over."""

    def close(self) -> None:
        """All are."""


class WithMetrics(Way):
    """By the server's metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def ended(self, choice: Choice) -> None:
        """Count it."""
        self._metrics.add("panel", 200, [choice])


class WithRayMetrics(Way):
    """By the router's metrics, which are Ray's."""

    def __init__(self, metrics: RunMetrics) -> None:
        self._metrics = metrics

    def ended(self, choice: Choice) -> None:
        """Count it."""
        self._metrics.add("panel", choice.ledger)


class WithRecords(Way):
    """By records in a file."""

    def __init__(self, path: Path) -> None:
        self._recorder = Recorder(path)
        self.close = self._recorder.close  # type: ignore[method-assign]

    def choice(self) -> Choice:
        """One that is recorded."""
        choice = Choice()
        choice.followers.append(self._recorder.run(_QUESTION))
        return choice


class WithTraces(Way):
    """By spans, sent nowhere."""

    def __init__(self) -> None:
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
        self._tracer = provider.get_tracer("benchmark")
        self.close = provider.shutdown  # type: ignore[method-assign]

    def choice(self) -> Choice:
        """One that is traced."""
        choice = Choice()
        choice.followers.append(RunSpans(self._tracer))
        return choice


async def block(running: Runner, way: Way) -> tuple[float, float]:
    """Seconds of CPU a request, in its own thread and in all, booked as the server books it."""
    own, whole = time.thread_time(), time.process_time()
    for _ in range(_BLOCK):
        choice = way.choice()
        async for batch in running.batches(_QUESTION, RunOptions(answer_flush_s=0)):
            for event in batch:
                choice.add(event)
        choice.close()
        way.ended(choice)
    own = time.thread_time() - own
    way.close()
    return own / _BLOCK, (time.process_time() - whole) / _BLOCK


async def main(seconds: float) -> None:
    """Measure all ways in turn, and print them."""
    running = runner(graph(2, reply_tokens=40))
    metrics = Metrics(Admission(ServerSettings()))
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    in_ray = RunMetrics(RayMetrics())
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Callable[[], Way]] = {
            "alone": Way,
            "metrics": lambda: WithMetrics(metrics),
            "in Ray": lambda: WithRayMetrics(in_ray),
            "records": lambda: WithRecords(Path(folder, "runs.sqlite")),
            "traces": WithTraces,
        }
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for name, way in ways.items():
                took[name].append(await block(running, way()))
    own, whole = ({name: statistics.median(t[n] for t in took[name]) for name in ways} for n in (0, 1))
    print(f"a request alone: {own['alone'] * 1e3:.2f} ms of CPU ({len(took['alone'])} blocks of {_BLOCK})")
    for name in list(ways)[1:]:
        mine, all_ = own[name] - own["alone"], whole[name] - whole["alone"]
        share = f"{100 * mine / own['alone']:+.1f} % ({100 * all_ / whole['alone']:+.1f} %)"
        print(f"{name:8} {mine * 1e6:+6.0f} us in its own thread ({all_ * 1e6:+6.0f} us in all): {share}")


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0))
