"""Calls that go to the shards together come back as if each had been alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moa_ray.gating import Gate
from moa_ray.moe import (
    ExpertChoice,
    GateError,
    LocalExperts,
    MoE,
    PoisonedBatch,
    PoolLost,
    SoftmaxTopK,
    StrictlyBalanced,
)
from moa_ray.moe.remote.batcher import Batcher
from tests.conftest import until
from tests.moe.remote.fleet import Fleet, fleet
from tests.moe.remote.test_faults import POISON, deadly
from tests.moe.remote.test_training import EXPERTS, D, fresh


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("batcher"), fresh(), shards=2, replicas=2) as running:
        yield running


def gate_of(kind: Any) -> Gate:
    torch.manual_seed(5)
    gate: Gate = kind(EXPERTS, 2, d_model=D)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return gate.eval()


def tokens(number: int, seed: int) -> Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed))


def together(batcher: Batcher, calls: list[Tensor]) -> list[Any]:
    """Results, or errors, of calls that are all in one batch."""
    answer = batcher._answer
    gathered: list[Any] = []
    batcher._answer = gathered.extend  # type: ignore[method-assign, assignment]
    with ThreadPoolExecutor(len(calls)) as threads:
        results = [threads.submit(batcher.forward, x_TD) for x_TD in calls]
        until(lambda: len(gathered) == len(calls))
        batcher._answer = answer  # type: ignore[method-assign]
        answer(gathered)
        return [result.exception(60) or result.result() for result in results]


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    kind=st.sampled_from([SoftmaxTopK, StrictlyBalanced, ExpertChoice]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_a_call_has_the_bits_of_local_experts_whatever_it_was_put_together_with(
    workers: Fleet, sizes: list[int], kind: Any, seed: int
) -> None:
    gate = gate_of(kind)
    here = MoE(D, gate, fresh()).eval()
    calls = [tokens(size, seed + place) for place, size in enumerate(sizes)]
    batcher = Batcher(gate, workers.caller(rank=None))
    found = together(batcher, calls)
    batcher.close()
    assert batcher.batches == 1
    for x_TD, y_TD in zip(calls, found, strict=True):
        assert torch.equal(y_TD, here(x_TD)[0])


@torch.no_grad()
def test_one_product_for_all_callers_is_equal_within_rounding(workers: Fleet) -> None:
    gate = gate_of(SoftmaxTopK)
    here = MoE(D, gate, fresh()).eval()
    batcher = Batcher(gate, workers.caller(rank=None), exact=False)
    calls = [tokens(3, seed) for seed in range(4)]
    for x_TD, y_TD in zip(calls, together(batcher, calls), strict=True):
        torch.testing.assert_close(y_TD, here(x_TD)[0])
    stats = batcher.stats()
    assert stats and int(stats.counts_E.sum()) == 2 * 4 * 3
    batcher.close()


def test_what_one_caller_does_wrong_is_not_the_others_concern(workers: Fleet) -> None:
    gate = gate_of(ExpertChoice)
    batcher = Batcher(gate, workers.caller(rank=None))
    found = together(batcher, [tokens(4, 0), torch.empty(0, D), tokens(4, 1)])
    assert isinstance(found[1], GateError)
    assert isinstance(found[0], Tensor) and isinstance(found[2], Tensor)
    batcher.close()
    with pytest.raises(PoolLost, match="router is closed"):
        batcher.forward(tokens(4, 0))


def test_tokens_that_kill_are_refused_and_those_beside_them_answered(tmp_path: Path) -> None:
    local: LocalExperts = fresh()
    gate = gate_of(SoftmaxTopK)
    poison_TD = tokens(4, 0)
    poison_TD[2] = POISON
    with fleet(tmp_path, local, shards=1, replicas=4, poison=deadly) as running, torch.no_grad():
        batcher = Batcher(gate, running.caller(rank=None))
        good, bad, also_good = together(batcher, [tokens(3, 1), poison_TD, tokens(3, 2)])
        assert isinstance(bad, PoisonedBatch)
        here = MoE(D, gate, local).eval()
        assert torch.equal(good, here(tokens(3, 1))[0])
        assert torch.equal(also_good, here(tokens(3, 2))[0])
        until(lambda: all(worker.address for worker in running.table().workers.values()))
        assert sum(worker.life - 1 for worker in running.table().workers.values()) <= 2
        batcher.close()
