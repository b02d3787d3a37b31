"""Batches of many callers in one message to each shard: the remedy for the shrinking batch (section 3.1).

With k of n experts a batch of b tokens leaves each expert k*b/n of them; d callers that share the experts make
that k*b*d/n (Shazeer et al. 2017). Whatever has come in while the last batch ran is the next one: nobody waits
for company.

Shape suffixes: C calls that were put together; otherwise see `moa_ray.moe.grouped`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moa_ray.errors import MoARayError
from moa_ray.gating import NO_EXPERT, Gate, GateStats, Routing
from moa_ray.moe.dispatch import combine
from moa_ray.moe.errors import PoisonedBatch, PoolLost
from moa_ray.moe.layer import run_experts
from moa_ray.moe.remote.caller import Caller


@dataclass(frozen=True, slots=True)
class _Call:
    x_TD: Tensor
    result: Future[Tensor] = field(default_factory=Future[Tensor])


class Batcher:
    """A gate in front of a caller of a pool; called from many threads at once.

    Args:
        gate: Chooses experts, for each call by itself; a copy in eval mode is kept.
        caller: Sends the rows.
        exact: Whether an expert computes each call's rows by themselves. A call's result is then bit for bit that of
            `LocalExperts`, whatever else was in the batch; otherwise an expert has one product for all of them,
            which is what makes the larger batch cheaper, and results are equal within rounding.
    """

    def __init__(self, gate: Gate, caller: Caller, *, exact: bool = True) -> None:
        self._gate = copy.deepcopy(gate).eval()
        self._caller = caller
        self._exact = exact
        self._waiting: list[_Call] = []
        self._arrived = threading.Condition()
        self._closed = False
        self._stats: GateStats | None = None
        self.batches = 0
        patience = caller.patience
        self._limit_s = 2 * (patience.call_s + patience.restore_s)
        self._thread = threading.Thread(target=self._work, daemon=True, name="moa-batcher")
        self._thread.start()

    def close(self) -> None:
        """Takes no more calls; those that wait are refused."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()

    def forward(self, x_TD: Tensor) -> Tensor:
        """Runs tokens through the layer.

        Raises:
            GateError: The gate refuses the tokens.
            PoisonedBatch: These tokens have killed workers.
            PoolLost: No answer in time.
        """
        call = _Call(x_TD)
        with self._arrived:
            if self._closed:
                raise PoolLost("the router is closed", hint="launch a new one")
            self._waiting.append(call)
            self._arrived.notify_all()
        try:
            return call.result.result(self._limit_s)
        except TimeoutError as error:
            raise PoolLost(f"the router's experts did not answer within {self._limit_s:g} s") from error

    def stats(self) -> GateStats | None:
        """Sums over all calls so far; None before the first."""
        return self._stats

    def _work(self) -> None:
        while calls := self._take():
            self._answer(calls)

    def _take(self) -> list[_Call]:
        with self._arrived:
            self._arrived.wait_for(lambda: self._waiting or self._closed)
            calls, self._waiting = self._waiting, []
            if self._closed:
                for call in calls:
                    call.result.set_exception(PoolLost("the router is closed", hint="launch a new one"))
                return []
            return calls

    @torch.no_grad()
    def _answer(self, calls: Sequence[_Call]) -> None:
        chosen: list[tuple[_Call, Routing]] = []
        for call in calls:
            try:
                chosen.append((call, self._gate(call.x_TD)))
            except (MoARayError, RuntimeError, ValueError, TypeError) as error:  # the actor's boundary
                call.result.set_exception(error)
        if not chosen:
            return
        try:
            self._run(chosen, deaths=2 if len(chosen) == 1 else 1)
        except PoisonedBatch:  # one of them kills workers: each by itself, with one more worker to lose
            for one in chosen:
                self._run_alone(one)
        except (MoARayError, RuntimeError, ValueError, TypeError, OSError) as error:  # the actor's boundary
            _refuse(chosen, error)

    def _run_alone(self, one: tuple[_Call, Routing]) -> None:
        try:
            self._run([one], deaths=1)
        except (MoARayError, RuntimeError, ValueError, TypeError, OSError) as error:  # the actor's boundary
            _refuse([one], error)

    def _run(self, chosen: Sequence[tuple[_Call, Routing]], deaths: int) -> None:
        calls = [call for call, _ in chosen]
        routing = _joined([routing for _, routing in chosen])
        counts_CE = torch.stack([routing.counts() for _, routing in chosen])
        shares_CE = counts_CE if self._exact and len(calls) > 1 else None
        experts = _Together(self._caller, shares_CE, deaths)
        used, plan, y_RD = run_experts(torch.cat([call.x_TD for call in calls]), routing, experts)
        y_TD = combine(y_RD, used.weights_TK, plan).to(y_RD.dtype)
        stats = GateStats.of(routing, plan.counts_E)
        self._stats = stats if self._stats is None else self._stats + stats
        self.batches += 1
        for call, mine_TD in zip(calls, y_TD.split([len(call.x_TD) for call in calls]), strict=True):
            call.result.set_result(mine_TD)


class _Together:
    """A caller as the experts of several calls at once."""

    def __init__(self, caller: Caller, shares_CE: Tensor | None, deaths: int) -> None:
        self.num_experts = caller.sizes.num_experts
        self.d_model = caller.sizes.d_model
        self._caller = caller
        self._shares_CE = shares_CE
        self._deaths = deaths

    def living(self) -> Tensor | None:
        return self._caller.living()

    def __call__(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        shares_CE = self._shares_CE
        if shares_CE is not None:  # masked experts have no rows left, of nobody
            shares_CE = shares_CE * (counts_E > 0)
        return self._caller.forward(x_RD, counts_E, shares_CE=shares_CE, deaths=self._deaths)


def _joined(routings: Sequence[Routing]) -> Routing:
    """One routing for the tokens of all, one after the other."""
    if len(routings) == 1:
        return routings[0]
    slots = max(routing.experts_TK.shape[1] for routing in routings)

    def padded(table_TK: Tensor, filler: float) -> Tensor:
        return torch.nn.functional.pad(table_TK, (0, slots - table_TK.shape[1]), value=filler)

    return replace(
        routings[0],
        experts_TK=torch.cat([padded(routing.experts_TK, NO_EXPERT) for routing in routings]),
        weights_TK=torch.cat([padded(routing.weights_TK, 0) for routing in routings]),
        importance_E=torch.stack([routing.importance_E for routing in routings]).sum(0),
        load_E=torch.stack([routing.load_E for routing in routings]).sum(0),
        full=all(routing.full and routing.experts_TK.shape[1] == slots for routing in routings),
    )


def _refuse(chosen: Sequence[tuple[_Call, Routing]], error: Exception) -> None:
    for call, _ in chosen:
        call.result.set_exception(error)
