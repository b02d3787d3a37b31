"""Hot experts get more holders while calls go on, and every call has the same bits before and after."""

from __future__ import annotations

import threading

import pytest
import torch

from moa_ray.moe import Balancer, ExpertPool, LocalExperts
from moa_ray.moe.remote.balancer import LoadMeter, busiest
from tests.conftest import until

COUNTS_E = torch.tensor([40, 4, 4, 4])


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_cluster")
@torch.no_grad()
def test_a_hot_expert_is_replicated_under_load_and_no_bit_changes() -> None:
    torch.manual_seed(0)
    local = LocalExperts(4, 8, 12)
    x_RD = torch.randn(52, 8)
    expected = local(x_RD, COUNTS_E)
    wrong: list[int] = []
    calls = [0]
    ended = threading.Event()

    def caller(pool: ExpertPool) -> None:
        with torch.no_grad():
            while not ended.is_set():
                calls[0] += 1
                if not torch.equal(pool(x_RD, COUNTS_E), expected):
                    wrong.append(calls[0])

    with ExpertPool.of(local, shards=2, num_cpus_per_shard=0.1) as pool:
        thread = threading.Thread(target=caller, args=(pool,))
        thread.start()
        try:
            until(lambda: calls[0] > 20)
            load = pool.load()
            assert load.max_over_mean == pytest.approx(40 / 13, rel=0.3)  # calls go on while it is read
            assert load.workers_max_over_mean == pytest.approx(44 / 26, rel=0.3)
            with Balancer(pool, every_s=0.2) as balancer:
                until(lambda: balancer.moves > 0)
            assert not balancer.trouble
            assert all(0 in experts for experts in pool.placement.values())
            seen = calls[0]
            until(lambda: calls[0] > seen + 20)
            assert not balancer.step()  # nothing left to gain
        finally:
            ended.set()
            thread.join(30)
    assert not wrong


def test_loads_are_those_since_the_last_look_also_after_a_restart() -> None:
    meter = LoadMeter(3)
    meter.read({"a": {"rows": {0: 5, 1: 1}}, "b": {"rows": {2: 2}}})
    load = meter.read({"a": {"rows": {0: 9, 1: 1}}, "b": {"rows": {2: 1}}})
    assert load.rows_E.tolist() == [4, 0, 1]
    assert load.rows_of == {"a": 4, "b": 1}


def test_the_busiest_worker_is_that_of_even_shares() -> None:
    rows_E = torch.tensor([60.0, 10.0, 20.0])
    assert busiest({"a": (0, 1), "b": (2,)}, rows_E) == 70
    assert busiest({"a": (0, 1), "b": (0, 2)}, rows_E) == 50
