"""The control plane: an actor for each worker, and one that keeps the table of them. Ray starts and restarts them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address

from moa_ray.moe.remote.placement import Placement, Table, Worker
from moa_ray.moe.remote.shard import ShardSpec
from moa_ray.moe.remote.snapshot import Snapshots, Source
from moa_ray.moe.remote.transport import Address
from moa_ray.moe.remote.worker import ShardWorker

CONTROL_S = 60.0
"""How long (seconds) a call of the control plane may take."""
_LONG_POLL_S = 20.0


class Keeper:
    """Knows every worker's experts and address, and tells callers when that changes.

    Args:
        placement: Experts of each worker.
    """

    def __init__(self, placement: Placement) -> None:
        self._table = Table(0, {name: Worker(name, experts) for name, experts in placement.items()})
        self._actors: dict[str, Any] = {}
        self._changed = asyncio.Condition()

    async def table(self) -> Table:
        """The table now."""
        return self._table

    async def newer(self, epoch: int) -> Table:
        """The table, once it is newer than `epoch`, or after a while."""
        async with self._changed:
            try:
                async with asyncio.timeout(_LONG_POLL_S):
                    await self._changed.wait_for(lambda: self._table.epoch > epoch)
            except TimeoutError:
                pass
            return self._table

    async def hire(self, actors: dict[str, Any]) -> None:
        """Learns the workers' actors, to be able to restart them."""
        self._actors |= actors

    async def register(self, name: str, address: Address) -> None:
        """A worker is there, for the first time or again."""
        worker = self._table.workers[name]
        await self._publish({**self._table.workers, name: replace(worker, life=worker.life + 1, address=address)})

    async def place(self, placement: Placement) -> None:
        """Another placement: callers learn it at once."""
        known = self._table.workers
        workers = {name: replace(known.get(name, Worker(name, ())), experts=e) for name, e in placement.items()}
        self._actors = {name: actor for name, actor in self._actors.items() if name in workers}
        await self._publish(workers)

    async def give_up(self, name: str, life: int) -> None:
        """Restarts a worker that does not answer, unless that has happened already."""
        worker = self._table.workers.get(name)
        if worker and worker.life == life and name in self._actors:
            await self._publish({**self._table.workers, name: replace(worker, address=None)})
            ray.kill(self._actors[name], no_restart=False)

    async def _publish(self, workers: dict[str, Worker]) -> None:
        async with self._changed:
            self._table = Table(self._table.epoch + 1, workers)
            self._changed.notify_all()


class ShardActor:
    """A worker as an actor; built anew by Ray after a crash, from its newest snapshot.

    Args:
        name: The worker's.
        spec: The pool's.
        secret: What callers must show.
        keeper_name: The keeper's.
    """

    def __init__(self, name: str, spec: ShardSpec, secret: str, keeper_name: str) -> None:
        keeper = ray.get_actor(keeper_name)
        table = ray.get(keeper.table.remote(), timeout=CONTROL_S)
        self._worker = ShardWorker(name, spec, table.workers[name].experts, secret, get_node_ip_address())
        ray.get(keeper.register.remote(name, self._worker.address), timeout=CONTROL_S)

    def facts(self) -> dict[str, Any]:
        """Process, version, and what it did: rows of each expert, seconds busy."""
        shard = self._worker.shard
        rows = dict(zip(shard.experts, shard.rows_taken, strict=True))
        return {"pid": os.getpid(), "version": shard.version, "rows": rows, "busy_s": shard.busy_s}

    def assign(self, experts: Sequence[int], source: Source | None = None) -> None:
        """Exchanges its experts."""
        self._worker.assign(experts, source)

    def save(self, directory: str | None) -> None:
        """Writes a snapshot, into the pool's own directory or another one."""
        shard = self._worker.shard
        shard.save(Snapshots(directory) if directory else shard.spec.snapshots)


class RayDirectory:
    """The keeper's table in a caller's process, pushed there by Ray.

    Args:
        keeper: The keeper's handle.
    """

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper
        self._changed = threading.Condition()
        self._closed = False
        self._table: Table = ray.get(keeper.table.remote(), timeout=CONTROL_S)
        self._subscribe()

    def close(self) -> None:
        """Follows no longer."""
        self._closed = True

    def table(self) -> Table:
        """See `Directory`."""
        return self._table

    def wait_newer(self, epoch: int, timeout_s: float) -> Table:
        """See `Directory`."""
        with self._changed:
            self._changed.wait_for(lambda: self._table.epoch > epoch, timeout_s)
            return self._table

    def give_up(self, worker: str, life: int) -> None:
        """See `Directory`."""
        self._keeper.give_up.remote(worker, life)

    def _subscribe(self) -> None:
        if not self._closed and ray.is_initialized():
            self._keeper.newer.remote(self._table.epoch).future().add_done_callback(self._hear)

    def _hear(self, future: Future[Table]) -> None:
        try:
            table = future.result()
        except RayError:  # without its keeper a pool goes on as it is
            return
        with self._changed:
            self._table = table
            self._changed.notify_all()
        self._subscribe()
