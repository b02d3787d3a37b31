"""The layer with every gate, over shards, has the bits it has over local experts: results, losses, all gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moa_ray.gating import Gate, Hierarchical
from moa_ray.moe import Experts, FeedForward, MoE
from moa_ray.moe.remote.caller import Caller
from tests.moe.remote.fleet import fleet
from tests.moe.remote.test_training import D, Remote, fresh
from tests.moe.test_layer import GATES


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    with fleet(tmp_path_factory.mktemp("layer"), fresh(), shards=3) as workers:
        yield workers.caller()


def everything(gate: Gate, experts: Experts, *, training: bool, capacity_factor: float | None) -> list[Tensor]:
    layer = MoE(D, gate, experts, capacity_factor=capacity_factor, shared=FeedForward(D, 4)).train(training)
    torch.manual_seed(1)
    for name, parameter in layer.named_parameters():
        if not name.startswith("experts."):
            torch.nn.init.normal_(parameter)
    x_TD = torch.randn(12, D, requires_grad=True)
    y_TD, aux = layer(x_TD)
    (y_TD.square().sum() + aux.loss).backward()
    grads = [p.grad for name, p in layer.named_parameters() if not name.startswith("experts.")]
    layer.zero_grad()
    return [y_TD.detach(), aux.stats.load_E, aux.stats.counts_E, *(g for g in (x_TD.grad, *grads) if g is not None)]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_over_shards_as_over_local_experts(
    caller: Caller, gate: Gate, training: bool, capacity_factor: float | None
) -> None:
    sides: list[Experts] = [fresh(), Remote(caller)]
    here, there = (everything(gate, side, training=training, capacity_factor=capacity_factor) for side in sides)
    assert len(here) == len(there) > 3
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_hierarchical_gate_sends_a_token_to_no_more_shards_than_groups(caller: Caller) -> None:
    gate = Hierarchical(3, 2, k_groups=1, k_experts=2, d_model=D).eval()
    shards = [set(peer.experts) for peer in caller.peers.all()]
    assert sorted(map(sorted, shards)) == [[0, 1], [2, 3], [4, 5]]  # a secondary mixture each
    for row in gate(torch.randn(20, D)).experts_TK.tolist():
        assert sum(bool(shard & set(row)) for shard in shards) == 1
