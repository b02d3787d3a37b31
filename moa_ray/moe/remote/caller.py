"""A caller's side of a pool: one message to each worker, results in a fixed order, nothing lost, no wait unbounded.

Two rules, by whether autograd is on. **Without it** rows go to one living holder of their expert; a lost or
slow one's rows go to another; experts without a living holder are reported, and the layer masks them.
**With it** nothing may be left out: what changes a shard is numbered, kept in a journal, and goes to every
holder; a worker that comes back from its snapshot is sent what it missed, and ends in the same bits.
"""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moa_ray.moe.errors import ExpertsLost, PoisonedBatch, PoolLost
from moa_ray.moe.optim import MOMENTS, WEIGHTS
from moa_ray.moe.remote.forward import Forward
from moa_ray.moe.remote.peers import GAP, Directory, Patience, Peer, Peers, check_reply
from moa_ray.moe.remote.rows import Rows, Suspects
from moa_ray.moe.remote.snapshot import Sizes
from moa_ray.moe.remote.transport import Channel, ChannelLost, Header, raw, wait_readable


@dataclass(frozen=True, slots=True)
class _Reply:
    experts: tuple[int, ...]
    header: Header
    payload: Tensor


@dataclass(slots=True)
class _Entry:
    """A message of the journal: its number, the step it is part of, and each worker's own rows of it."""

    number: int
    version: int
    header: Header
    rows: Rows | None = None
    replies: dict[str, _Reply] = field(default_factory=dict[str, _Reply])

    def message(self, peer: Peer, *, answer: bool = True) -> tuple[Header, list[memoryview]]:
        if self.rows is None:
            return self.header, []
        mine = [expert for expert in peer.experts if expert in self.rows.of]
        return self.header | self.rows.header(mine) | {"answer": answer and bool(mine)}, self.rows.views(mine)


class Caller:
    """Sends rows to workers and gets results back; one call at a time, from any thread.

    Args:
        sizes: The experts'.
        directory: Where the workers are.
        secret: What to show them.
        patience: How long to wait.
        rank: Which of the data-parallel callers this is; None for one that does not train.
    """

    def __init__(
        self, sizes: Sizes, directory: Directory, secret: str, patience: Patience, rank: int | None = None
    ) -> None:
        self.sizes = sizes
        self.rank = rank
        self.patience = patience
        self.version = 0
        self._life = uuid.uuid4().hex
        self._first_turn = int(self._life[:4], 16)  # callers do not all begin with the same replica
        self._one_at_a_time = threading.Lock()
        self._suspects = Suspects()
        self._calls = 0
        self._number = 0
        self._journal: list[_Entry] = []
        self.peers = Peers(directory, secret, self._catch_up)
        self.peers.wait(lambda: all(peer.up for peer in self.peers.all()), patience.restore_s)

    def close(self) -> None:
        """Closes all connections."""
        self.peers.close()

    def living(self) -> Tensor | None:
        """Which experts have a living holder, bool of shape (E,); None if all have."""
        peers = self.peers.all()
        if all(peer.up or peer.new for peer in peers):
            return None
        alive_E = torch.zeros(self.sizes.num_experts, dtype=torch.bool)
        for peer in peers:
            if peer.up or peer.new:
                alive_E[list(peer.experts)] = True
        return None if bool(alive_E.all()) else alive_E

    def name_call(self) -> str:
        """A name for a forward pass that a backward pass will follow."""
        self._calls += 1
        return f"{self._life}-{self._calls}"

    def forward(
        self,
        x_RD: Tensor,
        counts_E: Tensor,
        call: str = "",
        *,
        shares_CE: Tensor | None = None,
        deaths: int = 2,
    ) -> Tensor:
        """Runs rows through their experts.

        Args:
            x_RD: Rows sorted by expert, on any device.
            counts_E: Rows of each expert.
            call: Its name, if a backward pass will follow: the result then is exact or there is none.
            shares_CE: Rows of each of C calls that were put together, an expert's in their order; each call's are
                then computed by themselves, so that their bits do not depend on the others.
            deaths: Of workers that had the rows, after which these are not sent again.

        Raises:
            ExpertsLost: Experts without a living holder, where none may be waited for.
            PoolLost: They did not come back in time.
            PoisonedBatch: The batch has killed workers, and would kill more.
        """
        with self._one_at_a_time:
            header: Header = {"op": "forward"}
            if call:
                header |= {"call": call, "mark": self._mark()}
            rows = Rows.sort(counts_E, x_RD, shares_CE=shares_CE)
            self._calls += 1
            how: dict[str, Any] = {"exact": bool(call), "turn": self._first_turn + self._calls, "deaths": deaths}
            once = Forward(self.peers, self._suspects, self.patience, rows, header, **how)
            return once.run().to(x_RD.device)

    def backward(self, call: str, x_RD: Tensor, counts_E: Tensor, g_RD: Tensor) -> Tensor:
        """Gradient of a call's rows; every holder of an expert adds that of its weights to its own."""
        with self._one_at_a_time:
            rows = Rows.sort(counts_E, x_RD, g_RD)
            grad_x_RD = torch.empty_like(rows.parts[0])
            for reply in self._tell({"op": "backward", "call": call}, rows):
                left = raw(reply.payload)
                # Holders of the same expert answer the same bits.
                for view in rows.views([e for e in reply.experts if e in rows.of], (grad_x_RD,)):
                    view[:], left = left[: len(view)], left[len(view) :]
            return grad_x_RD.to(x_RD.device)

    def reduce(self) -> Tensor:
        """Adds up the callers' gradients; returns norms of each expert's matrices, float32 of shape (2, E)."""
        with self._one_at_a_time:
            norms_2E = torch.zeros(len(WEIGHTS), self.sizes.num_experts)
            for reply in self._tell({"op": "reduce"}):
                norms_2E[:, list(reply.experts)] = reply.payload.view(torch.float32).view(len(WEIGHTS), -1)
            return norms_2E

    def step(self, lr: float, scale: float = 1.0) -> int:
        """One Adam step in every shard, on gradients times `scale`; returns the number of steps done."""
        with self._one_at_a_time:
            self._tell({"op": "step", "lr": lr, "scale": scale})
            with self.peers.changed:
                self.version += 1
                durable = min(peer.durable for peer in self.peers.all())
                self._journal = [entry for entry in self._journal if entry.version > durable]
            return self.version

    def state(self, *, moments: bool = False) -> dict[str, Tensor]:
        """Weights of all experts, as `LocalExperts.state_dict` has them, or their moments; whole, in this process."""
        names = [f"{name}.{moment}" for moment in MOMENTS for name in WEIGHTS] if moments else list(WEIGHTS)
        with self._one_at_a_time:
            experts = self.sizes.num_experts
            whole = {n: torch.empty(experts, *self.sizes.shape(n), dtype=self.sizes.torch_dtype) for n in names}
            missing = set(range(experts))
            for peer in self.peers.up():
                if not missing & set(peer.experts):
                    continue
                header, payload = peer.ask({"op": "state", "names": names}, (), self.patience.call_s)
                flat = payload.view(self.sizes.torch_dtype)
                for tensor in whole.values():
                    size = len(header["experts"]) * tensor[0].numel()
                    tensor[header["experts"]] = flat[:size].view(-1, *tensor.shape[1:])
                    flat = flat[size:]
                missing -= set(header["experts"])
            if missing:
                raise ExpertsLost(missing)
            return whole

    # The journal.

    def _mark(self) -> list[int | str]:
        if self.rank is None:
            raise PoolLost("this copy of the pool does not train", hint="pool.caller(rank) gives one that does")
        return [self.rank, self._life, self._number]

    def _tell(self, header: Header, rows: Rows | None = None) -> list[_Reply]:
        """Enters a message into the journal and sends it to every worker; returns when each expert has taken it."""
        with self.peers.changed:
            self._number += 1
            entry = _Entry(self._number, self.version + 1, header, rows)
            entry.header["mark"] = self._mark()
            self._journal.append(entry)
            up = self.peers.up()
        deadline = time.monotonic() + self.patience.call_s
        waiting: dict[Channel, Peer] = {}
        for peer in up:
            assert peer.channel
            try:
                peer.channel.send(*entry.message(peer), deadline)
                waiting[peer.channel] = peer
            except ChannelLost:
                self.peers.lose(peer)
        try:
            while waiting and (readable := wait_readable(list(waiting), deadline - time.monotonic())):
                for channel in readable:
                    self._hear(entry, waiting.pop(channel), channel, deadline)
        finally:  # an answer that comes later is not to be taken for that to the next message
            for peer in waiting.values():
                self.peers.lose(peer, hangs=time.monotonic() >= deadline)
        self._wait_until_covered(entry)
        replies, entry.replies = list(entry.replies.values()), {}
        return replies

    def _hear(self, entry: _Entry, peer: Peer, channel: Channel, deadline: float) -> None:
        try:
            header, payload = channel.receive(deadline)
        except ChannelLost:
            if entry.rows:
                self._suspects.blame(entry.rows, [e for e in peer.experts if e in entry.rows.of])
            self.peers.lose(peer)
            return
        if header.get("error") in (GAP, "StalePool"):  # it was restarted, or given other experts: it catches up
            self.peers.lose(peer)
            return
        check_reply(header)
        self._book(entry, peer, header, payload)

    def _book(self, entry: _Entry, peer: Peer, header: Header, payload: Tensor) -> None:
        entry.replies[peer.name] = _Reply(peer.experts, header, payload)
        peer.durable = header.get("durable", peer.durable)

    def _wait_until_covered(self, entry: _Entry) -> None:
        def missing() -> list[int]:
            taken = {expert for reply in list(entry.replies.values()) for expert in reply.experts}
            return sorted(set(range(self.sizes.num_experts)) - taken)

        def settled() -> bool:
            return not missing() or bool(entry.rows and self._suspects.poisoned(entry.rows))

        if not self.peers.wait(settled, self.patience.restore_s):
            raise PoolLost(
                f"experts {missing()} did not come back within {self.patience.restore_s:g} s", hint=self.peers.trouble
            )
        if missing():
            raise PoisonedBatch("the batch killed two workers in its backward pass", hint="see the workers' logs")

    def _catch_up(self, peer: Peer) -> None:
        """Sends a worker what it missed, until nothing is left; only then it is up."""
        seen = 0
        if self.rank is not None:
            header, _ = peer.ask({"op": "greet", "rank": self.rank, "life": self._life}, (), self.patience.call_s)
            seen, peer.durable, peer.pid = header["seen"], header["durable"], header["pid"]
            if not self._number:
                self.version = header["version"]
        while True:
            with self.peers.changed:
                entry = next((each for each in self._journal if each.number > seen or self._awaits(each, peer)), None)
                if entry is None:
                    self.peers.bring_up(peer)
                    return
                newest = entry.number == self._number
            if entry.number > seen + 1:
                raise PoolLost(f"{peer.name} came back older than what this caller still knows")
            message, pieces = entry.message(peer, answer=newest)
            header, payload = peer.ask(message, pieces, self.patience.call_s)
            if newest:
                self._book(entry, peer, header, payload)
            peer.durable = header.get("durable", peer.durable)
            seen = entry.number

    def _awaits(self, entry: _Entry, peer: Peer) -> bool:
        """Whether a message may have been taken by a worker that then died, or lost its connection, unheard."""
        return entry.number == self._number and peer.name not in entry.replies
