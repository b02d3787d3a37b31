"""Experts in other processes equal those in this one bit for bit, whatever dies."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moa_ray.moe import LocalExperts, MoE, NoisyTopK
from moa_ray.moe.remote.autograd import RemoteCall
from moa_ray.moe.remote.caller import Caller
from moa_ray.moe.remote.shard import Shard
from moa_ray.moe.remote.snapshot import Snapshots
from tests.moe.remote.fleet import fleet

EXPERTS, D, H, TOKENS = 6, 8, 12, 40


def fresh(seed: int = 0) -> LocalExperts:
    torch.manual_seed(seed)
    return LocalExperts(EXPERTS, D, H)


class Remote:
    """A caller as the experts of a layer, as `ExpertPool` is one."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.num_experts, self.d_model = EXPERTS, D
        self._call = RemoteCall(caller)

    def __call__(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        return self._call(x_RD, counts_E)

    def living(self) -> Tensor | None:
        return None if torch.is_grad_enabled() else self.caller.living()


def backwards(experts: LocalExperts | Remote, seed: int, times: int = 1) -> list[Tensor]:
    """Forward and backward through a layer; results and gradients of all that is not an expert."""
    generator = torch.Generator().manual_seed(seed)
    gate = NoisyTopK(EXPERTS, 2, d_model=D).eval()
    gate.w_gate_DE.data = torch.randn(D, EXPERTS, generator=generator)
    found: list[Tensor] = []
    for _ in range(times):
        x_TD = torch.randn(TOKENS, D, generator=generator, requires_grad=True)
        y_TD, _ = MoE(D, gate, experts)(x_TD)
        y_TD.square().sum().backward()
        found += [y_TD.detach(), *(t.grad for t in (x_TD, gate.w_gate_DE) if t.grad is not None)]
    return found


def train_locally(steps: int, callers: int = 1) -> tuple[list[Tensor], LocalExperts]:
    """Each caller adds up its own gradients; their sums are added in the order of ranks."""
    local = fresh()
    adam = torch.optim.Adam(local.parameters(), fused=True)
    found: list[Tensor] = []
    for step in range(steps):
        total: list[Tensor] | None = None
        for rank in range(callers):
            found += backwards(local, 100 * step + rank, times=2)
            grads = [p.grad.clone() for p in local.parameters() if p.grad is not None]
            total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
            adam.zero_grad()
        for parameter, grad in zip(local.parameters(), total or [], strict=True):
            parameter.grad = grad
        adam.step()
        adam.zero_grad()
    return found, local


def train_remotely(caller: Caller, steps: int, pause_s: float = 0) -> list[Tensor]:
    found: list[Tensor] = []
    for step in range(steps):
        found += backwards(Remote(caller), 100 * step + (caller.rank or 0), times=2)
        time.sleep(pause_s)
        caller.step(1e-3)
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_weights(caller: Caller, local: LocalExperts) -> bool:
    weights = caller.state()
    return all(torch.equal(weights[name], tensor) for name, tensor in local.state_dict().items())


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (2, 1), (6, 1), (4, 2), (1, 3)])
def test_any_number_of_shards_and_replicas_gives_the_bits_of_local_experts(
    tmp_path: Path, shards: int, replicas: int
) -> None:
    expected, local = train_locally(steps=4)
    with fleet(tmp_path, fresh(), shards, replicas) as workers:
        caller = workers.caller()
        assert same(train_remotely(caller, steps=4), expected)
        assert same_weights(caller, local)


@pytest.mark.parametrize("callers", [2, 3])
def test_gradients_of_several_callers_are_summed_in_the_order_of_their_ranks(tmp_path: Path, callers: int) -> None:
    expected, local = train_locally(3, callers)
    with fleet(tmp_path, fresh(), shards=2, callers=callers) as workers, ThreadPoolExecutor() as threads:
        ours = [workers.caller(rank) for rank in range(callers)]
        found = list(threads.map(lambda caller: train_remotely(caller, 3), ours))
        per_call = len(found[0]) // 3
        by_step = [t for step in range(3) for f in found for t in f[step * per_call : (step + 1) * per_call]]
        assert same(by_step, expected)
        assert same_weights(ours[0], local)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_shard_killed_at_any_moment_of_training_changes_no_bit(tmp_path: Path, seed: int, replicas: int) -> None:
    expected, local = train_locally(steps=7)
    with fleet(tmp_path, fresh(), shards=2, replicas=replicas) as workers:
        chance = random.Random(seed)
        caller = workers.caller()
        killer = threading.Timer(chance.uniform(0, 0.15), workers.kill, [f"shard-{chance.randrange(2)}.0"])
        killer.start()
        assert same(train_remotely(caller, steps=7, pause_s=0.01), expected)
        killer.join()
        assert same_weights(caller, local)


def dies_after_its_first_snapshot(shard: type[Shard]) -> None:
    """A step is done and on disk, and nobody was told."""

    def save(self: Shard, snapshots: Snapshots) -> None:
        snapshots.write(self.name, self.experts, self.state())
        if self.version == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    shard.save = save  # type: ignore[method-assign]


@pytest.mark.parametrize("callers", [1, 2])
def test_a_step_that_a_shard_took_and_did_not_answer_is_asked_about_again(tmp_path: Path, callers: int) -> None:
    _, local = train_locally(5, callers)
    options: dict[str, Any] = {"poison": dies_after_its_first_snapshot, "callers": callers}
    with fleet(tmp_path, fresh(), shards=2, **options) as workers, ThreadPoolExecutor() as threads:
        ours = [workers.caller(rank) for rank in range(callers)]
        for run in [threads.submit(train_remotely, caller, 5) for caller in ours]:
            run.result(timeout=60)
        assert {worker.life for worker in workers.table().workers.values()} == {2}
        assert same_weights(ours[0], local)


def test_several_callers_survive_a_kill(tmp_path: Path) -> None:
    _, local = train_locally(6, callers=2)
    with fleet(tmp_path, fresh(), shards=2, callers=2) as workers, ThreadPoolExecutor() as threads:
        ours = [workers.caller(rank) for rank in range(2)]
        runs = [threads.submit(train_remotely, caller, 6, 0.02) for caller in ours]
        time.sleep(0.1)
        workers.kill("shard-1.0")
        for run in runs:
            run.result(timeout=60)
        assert same_weights(ours[1], local)


def test_gradient_norms_are_those_of_each_expert(tmp_path: Path) -> None:
    local = fresh()
    backwards(local, 0)
    expected = torch.stack([torch.stack([g.norm() for g in p.grad]) for p in local.parameters() if p.grad is not None])
    with fleet(tmp_path, fresh(), shards=3) as workers:
        caller = workers.caller()
        backwards(Remote(caller), 0)
        assert torch.equal(caller.reduce(), expected)
        caller.step(1e-3, scale=0.5)


def test_a_caller_keeps_no_more_rows_than_a_restart_needs(tmp_path: Path) -> None:
    with fleet(tmp_path, fresh(), shards=2, snapshot_every=3) as workers:
        caller = workers.caller()
        train_remotely(caller, 3)
        assert caller._journal == []
        train_remotely(caller, 2)
        assert {entry.version for entry in caller._journal} == {4, 5}


def test_a_caller_that_starts_anew_goes_on_where_training_is(tmp_path: Path) -> None:
    with fleet(tmp_path, fresh(), shards=2, snapshot_every=100) as workers:
        train_remotely(workers.caller(), 2)
        again = workers.caller()
        assert again.version == 2
        workers.kill("shard-0.0")
        train_remotely(again, 1)
        assert again.version == 3
