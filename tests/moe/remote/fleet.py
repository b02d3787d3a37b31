"""Workers of a pool as real processes without Ray: a fraction of a second to start, to be killed and started again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from moa_ray.moe import LocalExperts
from moa_ray.moe.remote.caller import Caller
from moa_ray.moe.remote.peers import Patience
from moa_ray.moe.remote.placement import Placement, Table, Worker, spread
from moa_ray.moe.remote.shard import Shard, ShardSpec
from moa_ray.moe.remote.snapshot import Loaded, Sizes, Snapshots
from moa_ray.moe.remote.worker import ShardWorker

SECRET = "only for tests"
Sabotage = Callable[[type[Shard]], None]
"""Changes the shards of all workers for the worse."""

PATIENCE = Patience(call_s=20, hedge_s=10, restore_s=20)

_processes = multiprocessing.get_context("forkserver")
# Besides ourselves, what torch imports in its first backward pass: a second that each worker would take.
_processes.set_forkserver_preload(["torch.fx.experimental.symbolic_shapes", __name__])


def _serve(pipe: Connection, name: str, spec: ShardSpec, experts: tuple[int, ...], poison: Sabotage | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if poison:
        poison(Shard)
    worker = ShardWorker(name, spec, experts, SECRET, "127.0.0.1")
    pipe.send(worker.address)
    while pipe.poll(None):  # until the test's end closes
        pipe.recv()


class Fleet:
    """Starts workers, starts them again when they die, and is the directory of their callers."""

    def __init__(self, spec: ShardSpec, placement: Placement, poison: Sabotage | None = None) -> None:
        self.spec = spec
        self._poison = poison
        self._changed = threading.Condition()
        self._table = Table(0, {name: Worker(name, experts) for name, experts in placement.items()})
        self._running: dict[str, tuple[BaseProcess, Connection]] = {}
        self._closed = False
        self.restarting = True
        self.callers: list[Caller] = []
        for name in placement:
            self._start(name)

    def table(self) -> Table:
        return self._table

    def wait_newer(self, epoch: int, timeout_s: float) -> Table:
        with self._changed:
            self._changed.wait_for(lambda: self._table.epoch > epoch, timeout_s)
            return self._table

    def give_up(self, worker: str, life: int) -> None:
        if self._table.workers[worker].life == life:
            self.kill(worker)

    def kill(self, name: str, how: int = signal.SIGKILL) -> None:
        pid = self._running[name][0].pid
        assert pid is not None
        os.kill(pid, how)

    def caller(self, rank: int | None = 0, patience: Patience = PATIENCE) -> Caller:
        self.callers.append(Caller(self.spec.sizes, self, SECRET, patience, rank))
        return self.callers[-1]

    def close(self) -> None:
        self._closed = True
        for caller in self.callers:
            caller.close()
        for process, _ in list(self._running.values()):
            process.kill()
            process.join(10)

    def _start(self, name: str) -> None:
        ours, theirs = _processes.Pipe()
        worker = self._table.workers[name]
        arguments = (theirs, name, self.spec, worker.experts, self._poison)
        process = _processes.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        assert ours.poll(30), f"{name} did not start"
        address = ours.recv()
        self._running[name] = process, ours
        with self._changed:
            there = replace(self._table.workers[name], life=worker.life + 1, address=address)
            self._table = Table(self._table.epoch + 1, {**self._table.workers, name: there})
            self._changed.notify_all()
        threading.Thread(target=self._watch, args=(name, process), daemon=True).start()

    def _watch(self, name: str, process: BaseProcess) -> None:
        process.join()
        if not self._closed and self.restarting:
            self._start(name)


@contextmanager
def fleet(
    directory: Path,
    local: LocalExperts,
    shards: int = 2,
    replicas: int = 1,
    poison: Sabotage | None = None,
    **options: Any,
) -> Iterator[Fleet]:
    """Workers that begin with the weights of some local experts."""
    begin = Snapshots(str(directory / "begin"))
    begin.write("local", range(local.num_experts), Loaded({n: t.detach() for n, t in local.state_dict().items()}))
    sizes = Sizes(local.num_experts, local.d_model, local.d_hidden, local.activation)
    defaults: dict[str, Any] = {"snapshot_every": 3, "threads": 1, "patience_s": 15.0}
    spec = ShardSpec(sizes, begin, Snapshots(str(directory / "snapshots")), **(defaults | options))
    running = Fleet(spec, spread(local.num_experts, shards, replicas), poison)
    try:
        yield running
    finally:
        running.close()
