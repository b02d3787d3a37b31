"""A caller's connections: followed by the table, lost by the socket, brought back by a thread each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moa_ray.moe.errors import PoolLost, StalePool
from moa_ray.moe.remote.placement import Table
from moa_ray.moe.remote.transport import Channel, ChannelLost, Header

GAP = "Gap"
"""A worker's reply to a message that follows others which it does not have."""

_POLL_S = 0.5
_LONGEST_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a caller waits, in seconds.

    Attributes:
        call_s: For a worker's answer; then the worker is given up, and restarted.
        hedge_s: Before the same rows are sent to another holder besides.
        restore_s: For experts without a living holder to come back, where they cannot be left out.
    """

    call_s: float = 60.0
    hedge_s: float = 5.0
    restore_s: float = 60.0


class Directory(Protocol):
    """Tells a caller where the workers are."""

    def table(self) -> Table:
        """The newest one known; does not wait."""
        ...

    def wait_newer(self, epoch: int, timeout_s: float) -> Table:
        """The newest one known, after waiting for one newer than `epoch` where there is none."""
        ...

    def give_up(self, worker: str, life: int) -> None:
        """Asks for a worker that does not answer to be restarted."""
        ...


class Peer:
    """One worker, as this caller is connected to it.

    Attributes:
        up: Whether it is connected, and has all that it should have.
        new: Whether it has not been up yet.
        durable: Version of its newest snapshot.
        pid: Its process, on its own machine.
    """

    def __init__(self, name: str, experts: tuple[int, ...]) -> None:
        self.name = name
        self.hold(experts)
        self.life = -1
        self.up = False
        self.new = True
        self.durable = 0
        self.pid = 0
        self.channel: Channel | None = None

    def hold(self, experts: tuple[int, ...]) -> None:
        """What the worker holds from now on."""
        self.experts = experts
        self.held = frozenset(experts)

    def ask(self, header: Header, pieces: Sequence[memoryview], timeout_s: float) -> tuple[Header, Tensor]:
        """One message and its reply."""
        if self.channel is None:
            raise ChannelLost(f"{self.name} is not connected")
        deadline = time.monotonic() + timeout_s
        self.channel.send(header, pieces, deadline)
        reply, payload = self.channel.receive(deadline)
        check_reply(reply)
        return reply, payload

    def close(self) -> None:
        """Closes the connection."""
        if self.channel:
            self.channel.close()


class Peers:
    """All workers of a pool as one caller sees them.

    Args:
        directory: Where they are.
        secret: What to show them.
        prepare: Called with each worker that is connected, before it counts as up; raises if it cannot be.
    """

    def __init__(self, directory: Directory, secret: str, prepare: Callable[[Peer], None]) -> None:
        self.directory = directory
        self.changed = threading.Condition()
        self._secret = secret
        self._prepare = prepare
        self._by_name: dict[str, Peer] = {}
        self._epoch = -1
        self._closed = False
        self.trouble = ""

    def close(self) -> None:
        """Closes all connections, and brings none back."""
        with self.changed:
            self._closed = True
            for peer in self._by_name.values():
                peer.close()

    def all(self) -> list[Peer]:
        """All workers of the newest table."""
        table = self.directory.table()
        if table.epoch != self._epoch:
            self._follow(table)
        return list(self._by_name.values())

    def up(self) -> list[Peer]:
        """Those that can be sent to."""
        return [peer for peer in self.all() if peer.up]

    def lose(self, peer: Peer, *, hangs: bool = False) -> None:
        """A worker's connection broke, or it `hangs`; from now on it is not up until it is brought back."""
        with self.changed:
            peer.close()
            if not peer.up:
                return
            peer.up = False
            if not self._closed:
                self._bring_back(peer)
        if hangs:
            self.directory.give_up(peer.name, peer.life)

    def wait(self, ready: Callable[[], Any], timeout_s: float) -> bool:
        """Waits until `ready()` is true; follows the table meanwhile. Returns whether it became true."""
        give_up = time.monotonic() + timeout_s
        while not ready():
            left = give_up - time.monotonic()
            if left <= 0 or self._closed:
                return False
            with self.changed:
                self.changed.wait(min(left, 0.02))
            self.all()
        return True

    def _follow(self, table: Table) -> None:
        with self.changed:
            self._epoch = table.epoch
            for name in self._by_name.keys() - table.workers.keys():
                self._by_name.pop(name).close()
            for worker in table.workers.values():
                if worker.name in self._by_name:
                    self._by_name[worker.name].hold(worker.experts)
                else:
                    self._by_name[worker.name] = Peer(worker.name, worker.experts)
                    self._bring_back(self._by_name[worker.name])

    def _bring_back(self, peer: Peer) -> None:
        threading.Thread(target=self._connect, args=(peer,), daemon=True, name=f"moa-{peer.name}").start()

    def _connect(self, peer: Peer) -> None:
        pause_s = 0.01
        while not self._closed and self._by_name.get(peer.name) is peer:
            table = self.directory.table()
            worker = table.workers.get(peer.name)
            if worker is None or worker.address is None:
                self.directory.wait_newer(table.epoch, _POLL_S)
                continue
            try:
                peer.channel = Channel.connect(worker.address, self._secret)
                peer.life = worker.life
                peer.hold(worker.experts)
                self._prepare(peer)
                return
            except (ChannelLost, PoolLost) as error:
                self.trouble = f"{peer.name}: {error}"
                peer.close()
                self.directory.wait_newer(table.epoch, pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def bring_up(self, peer: Peer) -> None:
        """A prepared worker may be sent to from now on."""
        with self.changed:
            peer.up, peer.new = True, False
            self.changed.notify_all()


def check_reply(reply: Header) -> None:
    """Raises what a worker says went wrong.

    Raises:
        StalePool: It does not hold what was asked of it.
        PoolLost: Anything else.
    """
    if kind := reply.get("error"):
        message = str(reply.get("message", kind))
        raise StalePool(message) if kind == StalePool.__name__ else PoolLost(message)
