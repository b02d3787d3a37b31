"""Inference while workers die, hang, are poisoned: no row lost where a replica is, the rest masked, all waits end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moa_ray.moe import ExpertsLost, LocalExperts, MoE, PoisonedBatch, SoftmaxTopK
from moa_ray.moe.remote.peers import Patience
from moa_ray.moe.remote.shard import Shard
from tests.conftest import until
from tests.moe.remote.fleet import fleet
from tests.moe.remote.test_training import EXPERTS, D, Remote, fresh

COUNTS_E = torch.full((EXPERTS,), 5)
POISON = 13.0


def rows(seed: int = 0) -> Tensor:
    return torch.randn(int(COUNTS_E.sum()), D, generator=torch.Generator().manual_seed(seed))


def deadly(shard: type[Shard]) -> None:
    """A shard that is killed by a certain value, as by a bug in a kernel."""
    forward: Callable[..., Any] = shard.forward

    def poisoned(self: Any, x_RD: Tensor, *rest: Any) -> Any:
        if (x_RD == POISON).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, x_RD, *rest)

    shard.forward = poisoned  # type: ignore[method-assign, assignment]


@torch.no_grad()
def test_with_a_replica_no_row_is_lost_when_a_shard_is_killed_under_load(tmp_path: Path) -> None:
    local = fresh()
    with fleet(tmp_path, local, shards=2, replicas=2) as workers:
        caller = workers.caller(rank=None)
        killers = [threading.Timer(0.05 * (i + 1), workers.kill, [f"shard-{i % 2}.{i // 2 % 2}"]) for i in range(2)]
        for killer in killers:
            killer.start()
        for seed in range(200):
            assert torch.equal(caller.forward(rows(seed), COUNTS_E), local(rows(seed), COUNTS_E))
        for killer in killers:
            killer.join()


@torch.no_grad()
def test_without_a_replica_lost_experts_are_masked_until_they_are_back(tmp_path: Path) -> None:
    local = fresh()
    with fleet(tmp_path, local, shards=2) as workers:
        caller = workers.caller(rank=None)
        layer, here = (MoE(D, SoftmaxTopK(EXPERTS, 4, d_model=D), e).eval() for e in (Remote(caller), local))
        layer.gate.load_state_dict(here.gate.state_dict())
        x_TD = rows()
        assert torch.equal(layer(x_TD)[0], here(x_TD)[0])
        workers.restarting = False
        workers.kill("shard-0.0")
        _, aux = layer(x_TD)
        assert 0 < aux.stats.dropped < 1
        assert not aux.stats.counts_E[:3].any()
        kept = here.gate(x_TD).keep(aux.routing.experts_TK >= 0)
        whole_T = aux.routing.weights_TK.sum(1)[aux.routing.weights_TK.any(1)]  # tokens that have an expert left
        torch.testing.assert_close(whole_T, torch.ones(len(whole_T)))
        assert torch.equal(aux.routing.weights_TK, kept.weights_TK)
        workers._start("shard-0.0")
        until(lambda: caller.living() is None)
        assert torch.equal(layer(x_TD)[0], here(x_TD)[0])


@torch.no_grad()
def test_a_hanging_shard_is_hedged_and_given_up(tmp_path: Path) -> None:
    local = fresh()
    with fleet(tmp_path, local, shards=1, replicas=2) as workers:
        caller = workers.caller(rank=None, patience=Patience(call_s=15, hedge_s=0.05, restore_s=15))
        workers.kill("shard-0.0", signal.SIGSTOP)
        for seed in range(6):  # whichever replica's turn it is
            assert torch.equal(caller.forward(rows(seed), COUNTS_E), local(rows(seed), COUNTS_E))
        workers.kill("shard-0.0", signal.SIGCONT)


@torch.no_grad()
def test_a_hanging_shard_without_replica_is_restarted(tmp_path: Path) -> None:
    local = fresh()
    with fleet(tmp_path, local, shards=2) as workers:
        caller = workers.caller(rank=None, patience=Patience(call_s=0.2, hedge_s=0.1, restore_s=15))
        workers.kill("shard-0.0", signal.SIGSTOP)
        with pytest.raises(ExpertsLost, match=r"no living shard holds experts \[0, 1, 2\]"):
            caller.forward(rows(), COUNTS_E)
        until(lambda: workers.table().workers["shard-0.0"].life == 2)
        assert torch.equal(workers.caller(rank=None).forward(rows(), COUNTS_E), local(rows(), COUNTS_E))


def test_a_batch_that_killed_two_shards_is_refused_the_third_time(tmp_path: Path) -> None:
    local = fresh()
    poison_RD = rows()
    poison_RD[7] = POISON
    with fleet(tmp_path, local, shards=1, replicas=3, poison=deadly) as workers, torch.no_grad():
        caller = workers.caller(rank=None)
        for _ in range(2):
            with pytest.raises(PoisonedBatch, match="killed two workers and are not sent a third time"):
                caller.forward(poison_RD, COUNTS_E)
        until(lambda: sum(worker.life for worker in workers.table().workers.values()) == 5)  # two deaths, no more
        assert torch.equal(caller.forward(rows(1), COUNTS_E), local(rows(1), COUNTS_E))
    with fleet(tmp_path / "training", local, shards=1, poison=deadly) as workers, pytest.raises(PoisonedBatch):
        Remote(workers.caller())(poison_RD, COUNTS_E)


def test_callers_without_the_secret_get_nothing(tmp_path: Path) -> None:
    from moa_ray.moe.remote.transport import Channel, ChannelLost

    with fleet(tmp_path, fresh(), shards=1) as workers:
        address = workers.table().workers["shard-0.0"].address
        assert address
        channel = Channel.connect(address, "wrong")
        with pytest.raises(ChannelLost):
            channel.send({"op": "state", "names": []}, (), time.monotonic() + 5)
            channel.receive(time.monotonic() + 5)


@torch.no_grad()
def test_a_bad_message_is_answered_and_the_shard_lives(tmp_path: Path) -> None:
    from moa_ray.moe import PoolLost

    local: LocalExperts = fresh()
    with fleet(tmp_path, local, shards=1) as workers:
        caller = workers.caller(rank=None)
        with pytest.raises(PoolLost, match=r"shard-0.0: RuntimeError"):
            caller.forward(torch.randn(30, D - 1), COUNTS_E)
        assert torch.equal(caller.forward(rows(), COUNTS_E), local(rows(), COUNTS_E))
