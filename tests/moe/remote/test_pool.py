"""Expert pools on a Ray cluster: placed, killed, moved, saved, refused."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from moa_ray.errors import ResourcesShort
from moa_ray.moe import (
    CheckpointError,
    ExpertPool,
    Fresh,
    GateError,
    LocalExperts,
    MoE,
    NoisyTopK,
    PoolError,
    PoolLost,
    SoftmaxTopK,
)
from tests.conftest import until

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]

EXPERTS, D, H = 6, 8, 12
SMALL: dict[str, Any] = {"num_cpus_per_shard": 0.1, "num_gpus_per_shard": 0.25}


@pytest.fixture(scope="module")
def local() -> LocalExperts:
    torch.manual_seed(0)
    return LocalExperts(EXPERTS, D, H)


@pytest.fixture(scope="module")
def pool(local: LocalExperts, ray_cluster: None) -> Iterator[ExpertPool]:
    with ExpertPool.of(local, shards=2, replicas=2, snapshot_every=2, **SMALL) as pool:
        yield pool


def results(experts: Any) -> list[Tensor]:
    torch.manual_seed(1)
    gate = NoisyTopK(EXPERTS, 2, d_model=D)
    x_TD = torch.randn(30, D, requires_grad=True)
    y_TD, aux = MoE(D, gate, experts)(x_TD)
    (y_TD.square().sum() + aux.loss).backward()
    return [y_TD.detach(), *(t.grad for t in (x_TD, *gate.parameters()) if t.grad is not None)]


def step_both(pool: ExpertPool, local: LocalExperts) -> None:
    local.zero_grad()
    adam = torch.optim.Adam(local.parameters(), fused=True)
    adam.load_state_dict(ADAM or adam.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results(pool), results(local), strict=True))
    pool.step(1e-3)
    adam.step()
    ADAM.update(adam.state_dict())


ADAM: dict[str, Any] = {}


def kill(*pids: int) -> None:
    """SIGKILL, and wait for the end: rows that are sent to a worker in its last moment are taken for its murderers."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(psutil.pid_exists, pids)))


def test_training_on_actors_that_are_killed_and_moved_equals_training_here(
    pool: ExpertPool, local: LocalExperts, tmp_path: Path
) -> None:
    step_both(pool, local)
    facts = pool.facts()
    assert facts["shard-0.0"]["version"] == 1
    kill(facts["shard-0.0"]["pid"])  # its replica goes on
    step_both(pool, local)
    kill(facts["shard-1.0"]["pid"], facts["shard-1.1"]["pid"])  # nobody has these experts: Ray restarts the actors
    step_both(pool, local)
    pool.place({"shard-0.0": (0, 3, 5), "shard-1.0": (1, 2), "new": (2, 4)})
    step_both(pool, local)
    assert pool.placement == {"shard-0.0": (0, 3, 5), "shard-1.0": (1, 2), "new": (2, 4)}
    pool.save(tmp_path / "saved")
    with ExpertPool.resume(tmp_path / "saved", shards=3, **SMALL) as resumed:
        step_both(resumed, local)
        weights = resumed.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in local.state_dict().items())


def test_a_copy_of_a_pool_is_for_inference(pool: ExpertPool) -> None:
    copy: ExpertPool = pickle.loads(pickle.dumps(pool))
    x_RD, counts_E = torch.randn(6, D), torch.ones(EXPERTS, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(copy(x_RD, counts_E), pool(x_RD, counts_E))
    with pytest.raises(PoolLost, match="does not train"):
        copy(x_RD, counts_E)
    copy.close()


def test_fresh_experts_do_not_depend_on_the_shards() -> None:
    with ExpertPool.launch(5, D, H, shards=2, source=Fresh(seed=3), **SMALL) as pool:
        weights = pool.state_dict()
    whole = Fresh(seed=3).load(pool._staff.spec.sizes, range(5)).tensors
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_what_cannot_be_is_refused_and_leaves_nothing(pool: ExpertPool, tmp_path: Path) -> None:
    import ray

    def in_use() -> float:
        used: float = ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0)
        return used

    before = in_use()
    with pytest.raises(PoolError, match="7 shards for 6 experts"):
        ExpertPool.launch(6, D, H, shards=7)
    with pytest.raises(ResourcesShort, match=r"bundle \d of 6 \(shard-\d\.0: 0.1 CPU, 3 GPU\) cannot be placed.*8 GPU"):
        ExpertPool.launch(6, D, H, shards=6, num_cpus_per_shard=0.1, num_gpus_per_shard=3, placement_timeout_s=2)
    with pytest.raises(CheckpointError, match="no checkpoint of a pool"):
        ExpertPool.resume(tmp_path)
    with pytest.raises(GateError, match="gate chooses from 5 experts, there are 6"):
        MoE(D, SoftmaxTopK(5, 2), pool)
    with pytest.raises(GateError, match="experts have d_model=8, the layer 9"):
        MoE(9, SoftmaxTopK(6, 2), pool)
    with pytest.raises(PoolError, match=r"no worker would hold experts \[5\]"):
        pool.place({"shard-0.0": range(5)})  # type: ignore[dict-item]
    with pytest.raises(PoolError, match="rank 1 of 1 callers"):
        pool.caller(1)
    until(lambda: in_use() <= before + 1e-6)  # less where the pool before was still leaving


def test_a_checkpoint_with_missing_experts_is_refused_by_their_names(tmp_path: Path) -> None:
    with ExpertPool.launch(4, D, H, shards=4, **SMALL) as pool:
        pool.save(tmp_path)
    next(tmp_path.glob("shard-2.0-*")).unlink()
    with pytest.raises(CheckpointError, match=r"lacks experts \[2\]"):
        ExpertPool.resume(tmp_path, **SMALL)
    next(tmp_path.glob("shard-1.0-*")).write_bytes(b"not a snapshot")
    with pytest.raises(CheckpointError, match="damaged snapshot"):
        ExpertPool.resume(tmp_path, **SMALL)
