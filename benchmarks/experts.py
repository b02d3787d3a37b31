"""Experts in actors against experts in this process, and against what else moves rows between processes.

    python -m benchmarks.experts [transport] [throughput] [latency] [experts] [kill] [balance]

Without arguments all of them. Every figure is a ratio or a time of sides that take turns in one run.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np
import ray
import torch

from moa_ray.moe import Balancer, ExpertPool, Fresh, LocalExperts, MoE, SoftmaxTopK
from moa_ray.moe.bench import compare
from moa_ray.moe.remote.snapshot import Loaded, Sizes
from moa_ray.moe.remote.transport import Channel, Server, raw

FOUR, SMALL = 4, 0.25


def transport() -> None:
    """An echo of 1 KB to 8 MB to four actors at once: Ray calls with numpy, our sockets."""

    @ray.remote(num_cpus=SMALL)
    class Echo:
        def __init__(self) -> None:
            self.server = Server(lambda header, payload: ({}, payload), "")

        def call(self, x: Any) -> Any:
            return x

        def address(self) -> Any:
            return self.server.address

    actors = [Echo.remote() for _ in range(FOUR)]
    channels = [Channel.connect(address, "") for address in ray.get([a.address.remote() for a in actors], timeout=60)]
    for size in (1 << 10, 1 << 16, 1 << 20, 1 << 23):
        x = torch.zeros(size, dtype=torch.uint8)
        array = np.zeros(size, dtype=np.uint8)

        def by_socket(x: torch.Tensor = x) -> None:
            for channel in channels:
                channel.send({}, (raw(x),), time.monotonic() + 10)
            for channel in channels:
                channel.receive(time.monotonic() + 10)

        def by_ray(array: Any = array) -> None:
            ray.get([actor.call.remote(array) for actor in actors], timeout=60)

        seconds = compare({"ray": by_ray, "socket": by_socket}, rounds=200 if size < 1 << 20 else 20)
        report(f"echo to {FOUR} actors, {size >> 10} KB each", seconds)


def throughput() -> None:
    """2 shards of 1 thread against this process with 2 threads; 4,096 tokens, d 512, h 2,048, k 2."""
    torch.set_num_threads(2)
    local = LocalExperts(8, 512, 2048)
    x_TD = torch.randn(4096, 512)
    with ExpertPool.of(local, shards=2, num_cpus_per_shard=1) as pool:
        layers = {"in process": MoE(512, gate(8, 512), local), "2 shards": MoE(512, gate(8, 512), pool)}

        def forward(layer: MoE) -> Callable[[], object]:
            return torch.no_grad()(lambda: layer(x_TD))

        def both(layer: MoE) -> Callable[[], object]:
            return lambda: layer(x_TD)[0].sum().backward()

        report("4,096 tokens, forward", compare({n: forward(layer) for n, layer in layers.items()}))
        report("4,096 tokens, forward and backward", compare({n: both(layer) for n, layer in layers.items()}, rounds=3))


def latency() -> None:
    """One layer of 64 tokens over 4 shards, experts that do next to nothing."""
    torch.set_num_threads(1)
    with ExpertPool.launch(8, 16, 4, shards=FOUR, num_cpus_per_shard=SMALL) as pool, torch.no_grad():
        layer = MoE(16, gate(8, 16), pool).eval()
        rows_RD, counts_E = torch.randn(128, 16), torch.full((8,), 16)
        x_TD = torch.randn(64, 16)
        for name, call in {"layer": lambda: layer(x_TD), "pool alone": lambda: pool(rows_RD, counts_E)}.items():
            times = sorted(timed(call) for _ in range(500))
            print(f"64 tokens over 4 shards, {name:12} p50 {times[250] * 1e3:.2f} ms   p99 {times[495] * 1e3:.2f} ms")


def experts() -> None:
    """The same tokens over ever more experts, k = 2."""
    seconds: dict[str, float] = {}
    for number in (8, 64, 256):
        with ExpertPool.launch(number, 128, 256, shards=2, num_cpus_per_shard=SMALL) as pool, torch.no_grad():
            layer, x_TD = MoE(128, gate(number, 128), pool).eval(), torch.randn(4096, 128)
            for _ in range(3):
                layer(x_TD)
            seconds[f"{number} experts"] = median(timed(lambda: layer(x_TD)) for _ in range(15))  # noqa: B023
    report("4,096 tokens, k = 2", seconds)


def kill() -> None:
    """SIGKILL of a shard under load: the longest pause between answers, tokens lost, and the way back."""
    for replicas in (2, 1):
        with (
            ExpertPool.launch(8, 64, 64, shards=2, replicas=replicas, num_cpus_per_shard=SMALL) as pool,
            torch.no_grad(),
        ):
            layer, x_TD = MoE(64, gate(8, 64), pool).eval(), torch.randn(64, 64)
            layer(x_TD)
            victim = pool.facts()["shard-0.0"]["pid"]
            killer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
            killer.start()
            began = last = time.perf_counter()
            pause = dropped = 0.0
            back = None
            while back is None and time.perf_counter() - began < 40:
                share = layer(x_TD)[1].stats.dropped
                now = time.perf_counter()
                pause, last, dropped = max(pause, now - last), now, max(dropped, share)
                killed = not killer.is_alive() and now - began > 0.6
                if killed and all(peer.up for peer in pool._caller.peers.all()):
                    back = now - began - 0.5
            print(
                f"SIGKILL under load, {replicas} replica(s): longest pause {pause * 1e3:.0f} ms, "
                f"most tokens' routes masked {dropped:.0%}, full strength after {back or float('nan'):.1f} s"
            )


def balance() -> None:
    """Zipf's load on 8 shards of 32 experts whose compute takes 1 ms a row: rows a second without and with planner."""
    share_E = 1 / np.arange(1, 33)
    share_E = np.random.default_rng(0).permutation(share_E / share_E.sum())
    with ExpertPool.launch(32, 16, 4, shards=8, num_cpus_per_shard=0.1, source=Scripted()) as pool:
        before = rows_a_second(pool, share_E)
        print(
            f"Zipf, 8 shards: {before:.0f} rows/s, busiest worker {pool.load().workers_max_over_mean:.2f} of the mean"
        )
        with Balancer(pool, spare=2, every_s=2) as balancer:
            while_moving = rows_a_second(pool, share_E)
            after = rows_a_second(pool, share_E)
        print(f"with the planner ({balancer.moves} moves): {while_moving:.0f}, then {after:.0f} rows/s")
        print(f"  {after / before:.2f} times as many (wanted: 2); ideal for 8 shards: 8000 rows/s")


class Scripted(Fresh):
    """Experts whose compute takes 1 ms a row, whatever the machine."""

    def load(self, sizes: Sizes, experts: Sequence[int]) -> Loaded:
        """Comes before the first row."""
        from moa_ray.moe.remote import shard

        shard.feed_forward = sleeping  # type: ignore[assignment]  # in the worker's process
        return super().load(sizes, experts)


def sleeping(x_RD: torch.Tensor, *_: object) -> torch.Tensor:
    time.sleep(1e-3 * len(x_RD))
    return x_RD.clone()


def rows_a_second(pool: ExpertPool, share_E: Any, seconds: float = 8.0, callers: int = 16) -> float:
    """What so many callers at once get through."""
    until = time.perf_counter() + seconds

    def call(seed: int) -> int:
        own, draw, done = pickle.loads(pickle.dumps(pool)), np.random.default_rng(seed), 0
        with torch.no_grad():
            while time.perf_counter() < until:
                counts_E = torch.from_numpy(draw.multinomial(64, share_E))
                own(torch.zeros(64, 16), counts_E)
                done += 64
        own.close()
        return done

    with ThreadPoolExecutor(callers) as threads:
        return sum(threads.map(call, range(callers))) / seconds


def gate(number: int, d_model: int) -> SoftmaxTopK:
    torch.manual_seed(0)
    return SoftmaxTopK(number, 2, d_model=d_model)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def report(title: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds.values()))
    print(title)
    for name, value in seconds.items():
        print(f"  {name:24} {value * 1e3:9.2f} ms   speed {first / value:5.2f}", flush=True)


PARTS: Sequence[Callable[[], None]] = (transport, throughput, latency, experts, kill, balance)


def main() -> None:
    wanted = sys.argv[1:] or [part.__name__ for part in PARTS]
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    for part in PARTS:
        if part.__name__ in wanted:
            part()


if __name__ == "__main__":
    main()
