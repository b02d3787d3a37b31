"""The experts of one worker: what they compute, their gradients, their optimizer, and which messages they took.

A shard is a deterministic machine: the same messages of each caller in the same order give the same bits.
That is what replicas, restarts and retries rest on. Each caller numbers what changes a shard (gradients,
reductions, steps); a shard takes each number once and in order, answers a repeated one without taking it
again, and says so when one is missing.

Shape suffixes: see `moa_ray.moe.grouped`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from moa_ray.moe.errors import CheckpointError, PoolLost, StalePool
from moa_ray.moe.experts import feed_forward
from moa_ray.moe.optim import MOMENTS, WEIGHTS
from moa_ray.moe.remote.snapshot import Loaded, Sizes, Snapshots, Source

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # Adam's own defaults, as in training without a pool
_HELD_CALLS = 8  # whose graphs are kept for their backward pass; an older one is computed again


class Gap(Exception):
    """A message came before some that it follows; the caller sends those first."""


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What all workers of a pool are told.

    Attributes:
        sizes: The experts'.
        source: Where experts come from that are in no snapshot.
        snapshots: Where theirs go.
        snapshot_every: Steps between two of them.
        callers: Data-parallel callers: a step waits for all of them.
        patience_s: How long (seconds) one caller waits for the others before it is an error.
        threads: Of torch in each worker; 0 leaves it to torch.
    """

    sizes: Sizes
    source: Source
    snapshots: Snapshots
    snapshot_every: int = 20
    callers: int = 1
    patience_s: float = 60.0
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """Names a message that changes the shard.

    Attributes:
        rank: Which of the data-parallel callers sends it.
        life: A caller that starts anew has another one, and counts from 1 again.
        number: Counts the caller's messages.
    """

    rank: int
    life: str
    number: int


class Shard:
    """Some experts and their state.

    Args:
        name: The worker's.
        spec: The pool's.
        experts: Which experts, ascending.
        source: Where to get them from; None: the newest snapshot, else the pool's source.
    """

    def __init__(self, name: str, spec: ShardSpec, experts: Sequence[int], source: Source | None = None) -> None:
        self.name = name
        self.spec = spec
        self.experts = tuple(experts)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._changed = threading.Condition(threading.RLock())
        loaded = self._newest() if source is None else source.load(spec.sizes, self.experts)
        self.version = loaded.version
        self.durable = loaded.version
        self._seen = dict(loaded.seen)
        self._seen_by_version = loaded.seen
        self._lives = loaded.lives
        self._place = {expert: place for place, expert in enumerate(self.experts)}
        self.weights = [loaded.tensors[name].to(self.device).requires_grad_() for name in WEIGHTS]
        # One list a moment, in the order of the weights; made by the first step.
        self._moments = [
            [loaded.tensors[f"{name}.{moment}"].to(self.device) for name in WEIGHTS if loaded.trained]
            for moment in MOMENTS
        ]
        self._sums: dict[int, list[Tensor]] = {}
        self._total: list[Tensor] | None = None
        self._ready: dict[int, int] = {}
        self.rows_taken = [0] * len(self.experts)
        self.busy_s = 0.0
        self._held: OrderedDict[str, tuple[Tensor, Tensor, Tensor]] = OrderedDict()

    def _newest(self) -> Loaded:
        try:
            return self.spec.snapshots.load(self.spec.sizes, self.experts)
        except CheckpointError:
            return self.spec.source.load(self.spec.sizes, self.experts)

    # What it computes.

    def counts(self, experts: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Rows of all experts held, from those of some; they count as work.

        Raises:
            StalePool: An expert is not here: the caller knows an older placement.
        """
        counts = self.spread(experts, rows)
        for place, number in enumerate(counts):
            self.rows_taken[place] += number
        return torch.tensor(counts)

    def spread(self, experts: Sequence[int], rows: Sequence[int]) -> list[int]:
        """Rows of all experts held, from those of some."""
        counts = [0] * len(self.experts)
        for expert, number in zip(experts, rows, strict=True):
            if expert not in self._place:
                raise StalePool(f"{self.name} does not hold expert {expert} any more")
            counts[self._place[expert]] = number
        return counts

    def forward(self, x_RD: Tensor, counts_E: Tensor, call: str = "") -> Tensor:
        """Runs rows through their experts; with a call's name, keeps what its backward pass will need."""
        x_RD = x_RD.to(self.device)
        counts_E = counts_E.to(self.device)
        with self._changed:
            if not call:
                with torch.no_grad():
                    used = counts_E.nonzero()
                    some = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
                    w_in_EDH, w_out_EHD = (weight[some] for weight in self.weights)
                    return feed_forward(x_RD, w_in_EDH, w_out_EHD, counts_E[some], self.spec.sizes.activation).cpu()
            with torch.enable_grad():
                x_RD.requires_grad_(True)
                y_RD = self._run(x_RD, counts_E)
            self._held[call] = (x_RD, counts_E, y_RD)
            if len(self._held) > _HELD_CALLS:
                self._held.popitem(last=False)
            return y_RD.detach().cpu()

    def forward_shares(self, x_RD: Tensor, counts_CE: Tensor) -> Tensor:
        """Runs the rows of several calls, an expert's in their order, each call's by themselves."""
        calls, experts = counts_CE.shape
        call_R = torch.arange(calls).repeat(experts).repeat_interleave(counts_CE.t().flatten())
        y_RD = torch.empty_like(x_RD)
        for call, counts_E in enumerate(counts_CE):
            mine_R = call_R == call
            y_RD[mine_R] = self.forward(x_RD[mine_R], counts_E)
        return y_RD

    def _run(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        w_in_EDH, w_out_EHD = self.weights
        return feed_forward(x_RD, w_in_EDH, w_out_EHD, counts_E, self.spec.sizes.activation)

    def backward(self, mark: Mark, call: str, x_RD: Tensor, counts_E: Tensor, g_RD: Tensor) -> Tensor:
        """Gradient of a call's rows; that of the weights is added to the caller's sum, once."""
        with self._changed:
            new = self._is_new(mark)
            counts_E = counts_E.to(self.device)
            held = self._held.pop(call, None)
            if held and torch.equal(held[1], counts_E):
                x_RD, _, y_RD = held
            else:  # the forward pass was another holder's, in part or whole, or is long ago
                with torch.enable_grad():
                    x_RD = x_RD.to(self.device).requires_grad_(True)
                    y_RD = self._run(x_RD, counts_E)
            grad_x_RD, *grads = torch.autograd.grad(y_RD, [x_RD, *self.weights], g_RD.to(self.device))
            if new:
                sums = self._sums.get(mark.rank)
                self._sums[mark.rank] = grads if sums is None else [a.add_(b) for a, b in zip(sums, grads, strict=True)]
                self._seen[mark.rank] = mark.number
            return grad_x_RD.cpu()

    # Steps.

    def reduce(self, mark: Mark) -> Tensor:
        """Adds up the callers' gradients, in the order of their ranks, once all have come this far.

        Returns:
            Norms of the gradient of each expert's matrices, float32 of shape (2, experts).
        """
        with self._changed:
            if self._is_new(mark):
                self._meet(mark, self._reduce)
            total = self._total or [torch.zeros_like(p) for p in self.weights]
            norms = [torch.stack(torch._foreach_norm(list(grad.unbind(0)))) for grad in total]
            return torch.stack(norms).float().cpu()

    def step(self, mark: Mark, lr: float, scale: float) -> int:
        """One Adam step on the sum of the callers' gradients times `scale`, once all have asked for it.

        Returns:
            The version, which is the number of steps done.
        """
        with self._changed:
            if self._is_new(mark):
                self._meet(mark, lambda: self._apply(lr, scale))
            return self.version

    def _meet(self, mark: Mark, then: Callable[[], None]) -> None:
        """Waits for the other callers; the last one to come does what they met for."""
        meeting = (self.version, self._total is None)
        self._ready[mark.rank] = mark.number
        if len(self._ready) == self.spec.callers:
            self._seen |= self._ready
            self._ready = {}
            then()
            self._changed.notify_all()
            return
        give_up = time.monotonic() + self.spec.patience_s
        while (self.version, self._total is None) == meeting:
            left = give_up - time.monotonic()
            if left <= 0:
                missing = sorted(set(range(self.spec.callers)) - self._ready.keys())
                raise PoolLost(f"{self.name}: callers {missing} did not come to step {self.version + 1} in time")
            self._changed.wait(left)

    def _reduce(self) -> None:
        ranks = sorted(self._sums)
        sums = [self._sums[rank] for rank in ranks] or [[torch.zeros_like(p) for p in self.weights]]
        total = sums[0]
        for other in sums[1:]:
            total = [a + b for a, b in zip(total, other, strict=True)]
        self._total = total
        self._sums = {}

    def _apply(self, lr: float, scale: float) -> None:
        if self._total is None:
            self._reduce()
        assert self._total is not None
        if not self._moments[0]:
            self._moments = [[torch.zeros_like(w, requires_grad=False) for w in self.weights] for _ in MOMENTS]
        first, second = self._moments
        with torch.no_grad():
            # What `torch.optim.Adam(fused=True)` calls; the class itself takes seconds to import torch's compiler.
            adam(
                [weight.data for weight in self.weights],
                [grad.mul_(scale) for grad in self._total],
                first,
                second,
                [],
                [torch.tensor(float(self.version), device=self.device) for _ in self.weights],
                fused=True,
                amsgrad=False,
                maximize=False,
                lr=lr,
                beta1=_BETA1,
                beta2=_BETA2,
                eps=_EPS,
                weight_decay=0.0,
            )
        self._total = None
        self._held.clear()
        self.version += 1
        self._seen_by_version = dict(self._seen)
        if self.version % self.spec.snapshot_every == 0:
            self.save(self.spec.snapshots)
            self.durable = self.version

    # Which messages it took.

    def greet(self, rank: int, life: str) -> int:
        """Number of the last message taken from this caller; a caller that starts anew starts at 0."""
        with self._changed:
            if self._lives.get(rank) != life:
                self._lives[rank] = life
                self._seen[rank] = self._seen_by_version[rank] = 0
                self._sums.pop(rank, None)
                self._ready.pop(rank, None)
                if self.durable != self.version:  # a restart must not go back behind the caller's beginning
                    self.save(self.spec.snapshots)
                    self.durable = self.version
            return self._seen[rank]

    def expect(self, mark: Mark) -> None:
        """Refuses a forward pass that follows messages which are not here.

        Raises:
            Gap: Some are missing.
        """
        if self._lives.get(mark.rank) != mark.life or self._seen[mark.rank] < mark.number:
            raise Gap

    def _is_new(self, mark: Mark) -> bool:
        if self._lives.get(mark.rank) != mark.life or mark.number > self._seen[mark.rank] + 1:
            raise Gap
        return mark.number == self._seen[mark.rank] + 1

    # Its state.

    def save(self, snapshots: Snapshots) -> None:
        """Writes a snapshot."""
        with self._changed:
            snapshots.write(self.name, self.experts, self.state())

    def state(self) -> Loaded:
        """Weights, moments and marks as they are; the tensors are the live ones."""
        tensors = {name: weight.detach() for name, weight in zip(WEIGHTS, self.weights, strict=True)}
        if self._moments[0]:
            for moment, values in zip(MOMENTS, self._moments, strict=True):
                tensors |= {f"{name}.{moment}": value for name, value in zip(WEIGHTS, values, strict=True)}
        return Loaded(tensors, self.version, dict(self._seen_by_version), dict(self._lives))
