"""The layer against other people's: Hugging Face's Mixtral block and fairscale's top-2 layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moa_ray.gating import SoftmaxTopK
from moa_ray.moe import LocalExperts, MoE

E, K, D, H = 8, 2, 32, 48


def grad(tensor: object) -> Tensor:
    assert isinstance(tensor, Tensor) and tensor.grad is not None
    return tensor.grad


@pytest.fixture
def mixtral() -> MixtralSparseMoeBlock:
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=K)
    setattr(config, "_experts_implementation", "eager")  # noqa: B010 (private to transformers)
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return block


def layer_with_weights_of(block: MixtralSparseMoeBlock) -> MoE:
    gate = SoftmaxTopK(E, K, d_model=D)
    experts = LocalExperts(E, D, H, activation="swiglu")
    gate.w_gate_DE.data = block.gate.weight.detach().t().contiguous()
    theirs = block.experts.state_dict()
    experts.w_in_EDH.data = theirs["gate_up_proj"].transpose(1, 2).contiguous()
    experts.w_out_EHD.data = theirs["down_proj"].transpose(1, 2).contiguous()
    return MoE(D, gate, experts)


def test_mixtral_block_is_equalled_forward_and_backward_within_1e_6(mixtral: MixtralSparseMoeBlock) -> None:
    layer = layer_with_weights_of(mixtral)
    assert isinstance(layer.gate, SoftmaxTopK) and isinstance(layer.experts, LocalExperts)
    x = torch.randn(2, 33, D)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    probe = torch.randn(2, 33, D) / D

    ours, _ = layer(ours_x)
    theirs = mixtral(theirs_x)
    ours.backward(probe)
    theirs.backward(probe)

    pairs = [
        (ours, theirs),
        (grad(ours_x), grad(theirs_x)),
        (grad(layer.gate.w_gate_DE), grad(mixtral.gate.weight).t()),
        (grad(layer.experts.w_in_EDH), grad(mixtral.experts.gate_up_proj).transpose(1, 2)),
        (grad(layer.experts.w_out_EHD), grad(mixtral.experts.down_proj).transpose(1, 2)),
    ]
    for mine, reference in pairs:
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_capacity_and_dropping_equal_fairscales_top2_layer(skew: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fairscale = pytest.importorskip("fairscale.nn.moe", reason="installed with pip --no-deps only")
    top2gate = pytest.importorskip("fairscale.nn.moe.top2gate")
    # fairscale draws the second expert at random; without its noise it is the second best.
    monkeypatch.setattr(top2gate, "gumbel_rsample", torch.zeros)
    torch.manual_seed(0)
    layer = MoE(D, SoftmaxTopK(4, 2), LocalExperts(4, D, H), capacity_factor=1.0)
    assert isinstance(layer.gate, SoftmaxTopK) and isinstance(layer.experts, LocalExperts)
    torch.nn.init.normal_(layer.gate.w_gate_DE)
    layer.gate.w_gate_DE.data[:, 0] += skew / D
    networks = torch.nn.ModuleList()
    for w_in_DH, w_out_HD in zip(layer.experts.w_in_EDH, layer.experts.w_out_EHD, strict=True):
        network = torch.nn.Sequential(torch.nn.Linear(D, H, False), torch.nn.ReLU(), torch.nn.Linear(H, D, False))
        network.load_state_dict({"0.weight": w_in_DH.t(), "2.weight": w_out_HD.t()})
        networks.append(network)
    theirs = fairscale.MOELayer(fairscale.Top2Gate(D, 4), networks)
    theirs.gate.wg.weight.data = layer.gate.w_gate_DE.detach().t().contiguous()

    x = torch.randn(4, 10, D) + skew
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, aux = layer(ours_x)
    reference = theirs(theirs_x)
    assert aux.stats.dropped > 0
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)

    probe = torch.randn_like(x)
    ours.backward(probe)
    reference.backward(probe)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad(layer.gate.w_gate_DE).t(), theirs.gate.wg.weight.grad, rtol=1e-4, atol=1e-4)
