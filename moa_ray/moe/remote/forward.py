"""One forward pass over workers: to a living holder of each expert, to another one where that fails."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_ray.moe.errors import ExpertsLost, PoisonedBatch, PoolLost, StalePool
from moa_ray.moe.remote.peers import GAP, Patience, Peer, Peers, check_reply
from moa_ray.moe.remote.placement import choose_holders
from moa_ray.moe.remote.rows import Rows, Suspects
from moa_ray.moe.remote.transport import Channel, ChannelLost, Header, wait_readable

_FIRST_CONNECTION_S = 5.0


@dataclass(frozen=True, slots=True)
class _Sent:
    peer: Peer
    experts: list[int]
    at: float


class Forward:
    """One call: made, run once, thrown away.

    Args:
        peers: The workers.
        suspects: What rows are known to kill.
        patience: How long to wait.
        rows: One part, the rows themselves.
        header: What each message says besides its rows.
        exact: Whether to wait for experts without a living holder instead of reporting them.
        turn: Rotates among equal holders.
        deaths: Of workers, after which the rows are not sent again.
    """

    def __init__(
        self,
        peers: Peers,
        suspects: Suspects,
        patience: Patience,
        rows: Rows,
        header: Header,
        *,
        exact: bool,
        turn: int,
        deaths: int,
    ) -> None:
        self._peers = peers
        self._suspects = suspects
        self._patience = patience
        self._rows = rows
        self._header = header
        self._exact = exact
        self._turn = turn
        self._deaths = deaths
        self._result_RD = torch.empty_like(rows.parts[0])
        self._todo = set(rows.of)
        self._missing = set(rows.of)
        self._slow: set[str] = set()
        self._waiting: dict[Channel, _Sent] = {}

    def run(self) -> Tensor:
        """The results in the order of the rows; see `Caller.forward` for what it raises."""
        try:
            while self._missing:
                if self._todo:
                    self._send()
                self._gather()
        finally:  # what was sent twice, or is not wanted any more, may still be answered: not to the next call
            for sent in self._waiting.values():
                self._peers.lose(sent.peer)
        self._suspects.acquit(self._rows)
        return self._result_RD

    def _send(self) -> None:
        holders = self._holders()
        if poisoned := [e for e in self._suspects.poisoned(self._rows, self._deaths) if e in self._todo]:
            raise PoisonedBatch(
                f"the rows for experts {poisoned} killed two workers and are not sent a third time",
                hint="look at these rows, and at the workers' logs",
            )
        busy = {sent.peer.name for sent in self._waiting.values()}
        wanted = {expert: self._rows.of[expert] for expert in self._todo}
        deadline = time.monotonic() + self._patience.call_s
        for name, experts in choose_holders(wanted, holders, self._turn).items():
            if name in busy:  # a channel takes one message at a time; the rows wait for their turn
                continue
            peer = next(p for p in self._peers.up() if p.name == name)
            assert peer.channel
            if wait_readable(
                [peer.channel], 0
            ):  # nothing was asked, so this is its end: it died, but not of these rows
                self._peers.lose(peer)
                continue
            try:
                header = self._header | self._rows.header(experts)
                peer.channel.send(header, self._rows.views(experts), deadline)
            except ChannelLost:
                self._peers.lose(peer)
                continue
            self._waiting[peer.channel] = _Sent(peer, experts, time.monotonic())
            self._todo -= set(experts)

    def _holders(self) -> dict[int, list[str]]:
        """Living holders of what is still to do; waits for them where it must and may."""

        def lost() -> list[int]:
            return sorted(self._todo.difference(*(peer.held for peer in self._peers.up())))

        if lost():
            arriving = {e for p in self._peers.all() if p.new for e in p.experts}
            if self._exact:
                if not self._peers.wait(lambda: not lost(), self._patience.restore_s):
                    raise PoolLost(
                        f"experts {lost()} did not come back within {self._patience.restore_s:g} s",
                        hint=self._peers.trouble,
                    )
            elif not (set(lost()) <= arriving and self._peers.wait(lambda: not lost(), _FIRST_CONNECTION_S)):
                raise ExpertsLost(lost())
        holders: dict[int, list[str]] = {expert: [] for expert in self._todo}
        for peer in self._peers.up():
            for expert in self._todo & peer.held:
                holders[expert].append(peer.name)
        return {e: [n for n in names if n not in self._slow] or names for e, names in holders.items()}

    def _gather(self) -> None:
        if not self._waiting:
            return
        oldest = min(sent.at for sent in self._waiting.values())
        now = time.monotonic()
        limits = [oldest + self._patience.call_s]
        if not self._exact:
            limits += [s.at + self._patience.hedge_s for s in self._waiting.values() if s.peer.name not in self._slow]
        readable = wait_readable(list(self._waiting), min(limits) - now)
        for channel in readable:
            self._take(channel, self._waiting.pop(channel))
        if not readable:
            self._late(time.monotonic())

    def _take(self, channel: Channel, sent: _Sent) -> None:
        deadline = time.monotonic() + self._patience.call_s
        wanted = [expert for expert in sent.experts if expert in self._missing]
        try:
            header, size = channel.receive_header(deadline)
            if size and wanted == sent.experts:
                channel.receive_into(self._rows.views(wanted, (self._result_RD,)), deadline)
            elif size:  # a hedge answered first; what comes late has nowhere to go
                self._peers.lose(sent.peer)
                return
        except ChannelLost:
            self._suspects.blame(self._rows, sent.experts)
            self._peers.lose(sent.peer)
            self._todo |= set(wanted)
            return
        if header.get("error") == GAP:
            self._peers.lose(sent.peer)
            self._todo |= set(wanted)
            return
        try:
            check_reply(header)
        except StalePool:  # the workers are ahead of our table
            self._peers.wait(lambda: not sent.peer.held.issuperset(wanted), _FIRST_CONNECTION_S)
            if sent.peer.held.issuperset(wanted):
                raise
            self._todo |= set(wanted)
            return
        self._missing -= set(wanted)
        self._todo -= set(wanted)

    def _late(self, now: float) -> None:
        for channel, sent in list(self._waiting.items()):
            if now >= sent.at + self._patience.call_s:
                del self._waiting[channel]
                self._peers.lose(sent.peer, hangs=True)
                self._todo |= set(sent.experts) & self._missing
            elif not self._exact and now >= sent.at + self._patience.hedge_s and sent.peer.name not in self._slow:
                self._slow.add(sent.peer.name)
                others = {e for p in self._peers.up() if p.name not in self._slow for e in p.experts}
                self._todo |= set(sent.experts) & self._missing & others
