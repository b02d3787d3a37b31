"""The router as an actor: called by many at once, restarted when it dies, refused where it cannot be."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from moa_ray.moe import ExpertPool, GateError, LocalExperts, MoE, PoolLost, Router, SoftmaxTopK

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]

EXPERTS, D, H = 6, 8, 12


@pytest.fixture(scope="module")
def here(ray_cluster: None) -> MoE:
    torch.manual_seed(0)
    gate = SoftmaxTopK(EXPERTS, 2, d_model=D)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return MoE(D, gate, LocalExperts(EXPERTS, D, H)).eval()


@pytest.fixture(scope="module")
def router(here: MoE) -> Iterator[Router]:
    assert isinstance(here.experts, LocalExperts)
    with (
        ExpertPool.of(here.experts, shards=2, num_cpus_per_shard=0.1) as pool,
        Router.launch(here.gate, pool, num_cpus=0.1) as router,
    ):
        yield router


def tokens(number: int, seed: int) -> Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_many_callers_at_once_get_the_bits_of_local_experts(router: Router, here: MoE) -> None:
    copy: Router = pickle.loads(pickle.dumps(router))
    calls = [tokens(1 + seed % 5, seed) for seed in range(60)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda one: (router, copy)[one % 2](calls[one]), range(len(calls))))
    assert all(torch.equal(y_TD, here(x_TD)[0]) for x_TD, y_TD in zip(calls, found, strict=True))
    assert router(torch.zeros(2, 3, D)).shape == (2, 3, D)
    stats = router.stats()
    assert stats["batches"] <= len(calls) + 1
    assert stats["max_over_mean_load"] >= 1


@torch.no_grad()
def test_a_router_that_is_killed_starts_again_and_answers(router: Router, here: MoE) -> None:
    ray.kill(router._actor, no_restart=False)
    assert torch.equal(router(tokens(4, 0)), here(tokens(4, 0))[0])


def test_what_does_not_fit_is_refused(router: Router, here: MoE) -> None:
    bad: list[tuple[Tensor, str]] = [
        (tokens(4, 0)[:, :3], r"x has shape \(4, 3\), expected \(tokens, 8\)"),
        (tokens(4, 0).double(), "x has dtype torch.float64, the pool torch.float32"),
        (torch.empty(0, D), r"shape \(0, 8\)"),
    ]
    for x, message in bad:
        with pytest.raises(GateError, match=message):
            router(x)
    pool: Any = here.experts
    with pytest.raises(GateError, match="gate chooses from 5 experts, there are 6"):
        Router.launch(SoftmaxTopK(5, 2), pool)


def test_a_router_that_is_gone_says_what_to_do(router: Router) -> None:
    router.close()
    with pytest.raises(PoolLost, match="gone for good") as caught:
        router(tokens(4, 0))
    assert "Router.launch" in caught.value.hint
