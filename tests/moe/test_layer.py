from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moa_ray.gating import (
    ExpertChoice,
    Gate,
    GateError,
    Hierarchical,
    LossFreeBias,
    NoisyTopK,
    SoftmaxTopK,
    StrictlyBalanced,
)
from moa_ray.moe import FeedForward, LocalExperts, MoE


def layer_of(gate: Gate, d_model: int = 8, d_hidden: int = 12, dtype: torch.dtype = torch.float32) -> MoE:
    layer = MoE(d_model, gate, LocalExperts(gate.num_experts, d_model, d_hidden)).to(dtype)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def dense_reference(layer: MoE, x_TD: Tensor) -> Tensor:
    """Every expert on every token, weighted by a dense G(x) that is 0 for the experts not chosen."""
    routing = layer.gate(x_TD)
    experts = layer.experts
    assert isinstance(experts, LocalExperts)
    weights_TE = routing.weights_TK.new_zeros(len(x_TD), routing.num_experts + 1)
    weights_TE = weights_TE.scatter(1, routing.experts_TK % (routing.num_experts + 1), routing.weights_TK)
    hidden_ETH = torch.einsum("td,edh->eth", x_TD, experts.w_in_EDH).relu()
    return torch.einsum("te,eth,ehd->td", weights_TE[:, :-1], hidden_ETH, experts.w_out_EHD)


WEIGHTS = ("w_in_EDH", "w_out_EHD")
GATES = [
    NoisyTopK(6, 2),
    Hierarchical(3, 2, k_groups=2, k_experts=1),
    StrictlyBalanced(6, 2),
    ExpertChoice(6, 2),
    SoftmaxTopK(6, 2),
    LossFreeBias(6, 2),
]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_result_and_gradients_equal_the_dense_reference(gate: Gate, training: bool) -> None:
    torch.manual_seed(0)
    layer = layer_of(gate, dtype=torch.float64).train(training)
    x_TD = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    probe_TD = torch.randn(12, 8, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for dense in (False, True):
        torch.manual_seed(1)
        y_TD = dense_reference(layer, x_TD) if dense else layer(x_TD)[0]
        inputs = [x_TD, *layer.parameters()]
        grads = torch.autograd.grad(y_TD, inputs, probe_TD, allow_unused=True, materialize_grads=True)
        results.append([y_TD, *grads])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=20)
@given(experts=st.integers(1, 6), tokens=st.integers(1, 9))
def test_with_k_equal_n_the_layer_is_the_dense_softmax_mixture(experts: int, tokens: int) -> None:
    layer = layer_of(NoisyTopK(experts, experts), dtype=torch.float64).eval()
    local, gate = layer.experts, layer.gate
    assert isinstance(local, LocalExperts) and isinstance(gate, NoisyTopK)
    x_TD = torch.randn(tokens, 8, dtype=torch.float64)
    hidden_ETH = torch.einsum("td,edh->eth", x_TD, local.w_in_EDH).relu()
    mixture_TD = torch.einsum("te,eth,ehd->td", (x_TD @ gate.w_gate_DE).softmax(1), hidden_ETH, local.w_out_EHD)
    torch.testing.assert_close(layer(x_TD)[0], mixture_TD)


def test_one_expert_is_a_plain_feed_forward_network() -> None:
    layer = layer_of(NoisyTopK(1, 1))
    dense = FeedForward(8, 12)
    assert isinstance(layer.experts, LocalExperts)
    dense.expert.load_state_dict(layer.experts.state_dict())
    x_TD = torch.randn(7, 8)
    torch.testing.assert_close(layer(x_TD)[0], dense(x_TD))


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_permuting_tokens_permutes_results_and_permuting_experts_changes_nothing(gate: Gate, seed: int) -> None:
    torch.manual_seed(seed)
    layer = layer_of(gate).eval()
    x_TD = torch.randn(10, 8)
    y_TD, aux = layer(x_TD)
    order_T, order_E = torch.randperm(10), torch.randperm(6)
    torch.testing.assert_close(layer(x_TD[order_T])[0], y_TD[order_T])
    if isinstance(gate, Hierarchical):  # its experts are tied to groups, so the groups move as a whole
        order_G = torch.randperm(3)
        order_E = (2 * order_G[:, None] + torch.arange(2)).flatten()
        gate.primary.w_gate_DE.data = gate.primary.w_gate_DE.data[:, order_G]
        gate.secondary = torch.nn.ModuleList(gate.secondary[int(g)] for g in order_G)
    else:
        gate.load_state_dict({name: of_expert[..., order_E] for name, of_expert in gate.state_dict().items()})
    assert isinstance(layer.experts, LocalExperts)
    layer.experts.load_state_dict({name: w[order_E] for name, w in layer.experts.state_dict().items()})
    permuted_TD, permuted_aux = layer(x_TD)
    torch.testing.assert_close(permuted_TD, y_TD)
    torch.testing.assert_close(permuted_aux.stats.load_E, aux.stats.load_E[order_E])


def test_a_token_that_stands_twice_in_a_batch_gets_the_same_result_twice() -> None:
    layer = layer_of(NoisyTopK(6, 2)).eval()
    x_TD = torch.randn(4, 8)
    y_TD, _ = layer(torch.cat([x_TD, x_TD]))
    torch.testing.assert_close(y_TD[:4], y_TD[4:])


SMALL_GATES = [
    NoisyTopK(4, 2, w_importance=0.5, w_load=0.5),
    Hierarchical(2, 2, k_groups=1, k_experts=1, w_importance=0.5, w_load=0.5),
    StrictlyBalanced(4, 2, w_threshold=0.5),
    ExpertChoice(4, 2),
    SoftmaxTopK(4, 2),
    LossFreeBias(4, 2),
]


@pytest.mark.parametrize("gate", SMALL_GATES, ids=lambda gate: type(gate).__name__)
def test_gradients_of_result_and_losses_equal_finite_differences(gate: Gate) -> None:
    torch.manual_seed(0)
    layer = layer_of(gate, d_model=4, d_hidden=4, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def run(x_TD: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(2)
        y_TD, aux = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x_TD,))
        return y_TD, aux.loss

    inputs = [torch.randn(5, 4, dtype=torch.float64), *(p.detach().clone() for p in layer.parameters())]
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs], eps=1e-7, atol=1e-5)


class Shards:
    """Experts that are no module and run in parts, as workers would: what the protocol asks and no more."""

    def __init__(self, whole: LocalExperts, sizes: list[int]) -> None:
        self.num_experts, self.d_model = whole.num_experts, whole.d_model
        self.shards: list[LocalExperts] = []
        weights = zip(whole.w_in_EDH.split(sizes), whole.w_out_EHD.split(sizes), strict=True)
        for w_in_EDH, w_out_EHD in weights:
            shard = LocalExperts(len(w_in_EDH), whole.d_model, whole.d_hidden)
            shard.load_state_dict({"w_in_EDH": w_in_EDH, "w_out_EHD": w_out_EHD})
            self.shards.append(shard)

    def __call__(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        counts = counts_E.split([shard.num_experts for shard in self.shards])
        rows = x_RD.split([int(c.sum()) for c in counts])
        return torch.cat([shard(x, c) for shard, x, c in zip(self.shards, rows, counts, strict=True)])


@pytest.mark.parametrize("sizes", [[3, 3], [1, 4, 1], [6]])
def test_experts_in_shards_equal_local_ones_bit_for_bit(sizes: list[int]) -> None:
    torch.manual_seed(0)
    local = LocalExperts(6, 8, 12)
    gate = NoisyTopK(6, 2, d_model=8)
    sharded = Shards(local, sizes)
    results: list[list[Tensor]] = []
    for experts in (local, sharded):
        torch.manual_seed(1)
        x_TD = torch.randn(40, 8, requires_grad=True)
        gate.zero_grad()
        y_TD, aux = MoE(8, gate, experts)(x_TD)
        (y_TD.square().sum() + aux.loss).backward()
        results.append([y_TD, *(p.grad.clone() for p in (x_TD, *gate.parameters()) if p.grad is not None)])
    parts = [torch.cat([w for s in sharded.shards if (w := getattr(s, name).grad) is not None]) for name in WEIGHTS]
    assert len(results[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(part, getattr(local, name).grad) for part, name in zip(parts, WEIGHTS, strict=True))


def test_leading_dimensions_are_one_batch() -> None:
    layer = layer_of(NoisyTopK(6, 2)).eval()
    x = torch.randn(2, 5, 8)
    assert torch.equal(layer(x)[0].view(10, 8), layer(x.view(10, 8))[0])


def test_shared_experts_are_added_for_every_token() -> None:
    shared = FeedForward(8, 16)
    layer = layer_of(NoisyTopK(6, 2)).eval()
    x_TD = torch.randn(5, 8)
    alone_TD, _ = layer(x_TD)
    layer.shared = shared
    torch.testing.assert_close(layer(x_TD)[0], alone_TD + shared(x_TD))


def test_aux_holds_the_sum_of_losses_and_the_statistics() -> None:
    layer = layer_of(NoisyTopK(6, 2))
    _, aux = layer(torch.randn(30, 8))
    assert float(aux.loss.detach()) == pytest.approx(sum(float(loss.detach()) for loss in aux.losses.values()))
    assert int(aux.stats.counts_E.sum()) == 60
    _, aux = layer.eval()(torch.randn(30, 8))
    assert float(aux.loss) == 0


def test_without_capacity_nothing_is_dropped_and_with_it_what_is_over() -> None:
    gate = NoisyTopK(4, 1).eval()
    layer = layer_of(gate)
    gate.w_gate_DE.data.zero_()  # ties: every token goes to one and the same expert
    x_TD = torch.randn(16, 8)
    assert layer(x_TD)[1].stats.dropped == 0
    layer.capacity_factor = 1.0
    y_TD, aux = layer(x_TD)
    assert aux.stats.dropped == pytest.approx(12 / 16)
    assert y_TD[:4].any(1).all() and not y_TD[4:].any()


def test_bfloat16_and_autocast_stay_close_to_float32() -> None:
    torch.manual_seed(0)
    layer = layer_of(SoftmaxTopK(6, 2)).eval()
    x_TD = torch.randn(20, 8).bfloat16().float()
    expected_TD, _ = layer(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        y_TD, _ = layer(x_TD)
    assert y_TD.dtype == torch.bfloat16
    torch.testing.assert_close(y_TD.float(), expected_TD, rtol=0.05, atol=0.05)
    half = layer.bfloat16()
    assert half(x_TD.bfloat16())[0].dtype == torch.bfloat16


def test_the_same_seed_gives_the_same_bits() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        layer = layer_of(NoisyTopK(6, 2))
        y_TD, aux = layer(torch.randn(50, 8))
        (y_TD.square().sum() + aux.loss).backward()
        return [p.grad for p in layer.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize(
    ("x", "complaint"),
    [
        (torch.randn(3, 7), r"shape \(3, 7\), expected \(tokens, 8\)"),
        (torch.randn(8), r"shape \(8,\)"),
        (torch.randn(0, 8), "empty"),
        (torch.randn(3, 8, dtype=torch.float64), "float64, the layer's weights torch.float32"),
        (torch.ones(3, 8, dtype=torch.int64), "int64"),
    ],
)
def test_wrong_input_is_refused_by_name(x: Tensor, complaint: str) -> None:
    with pytest.raises(GateError, match=complaint):
        layer_of(NoisyTopK(6, 2))(x)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(GateError, match="from 4 experts, there are 5"):
        MoE(8, NoisyTopK(4, 2), LocalExperts(5, 8, 8))
    with pytest.raises(GateError, match="experts have d_model=9, the layer 8"):
        MoE(8, NoisyTopK(4, 2), LocalExperts(4, 9, 8))
    with pytest.raises(GateError, match="gate has d_model=9"):
        MoE(8, NoisyTopK(4, 2, d_model=9), LocalExperts(4, 8, 8))
    for factor in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(GateError, match="no limit above 0"):
            MoE(8, NoisyTopK(4, 2), LocalExperts(4, 8, 8), capacity_factor=factor)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_debug_mode_names_the_tensor_that_is_not_finite(bad: float) -> None:
    layer = layer_of(NoisyTopK(6, 2))
    layer.debug = True
    x_TD = torch.randn(5, 8)
    layer(x_TD)
    x_TD[2, 3] = bad
    with pytest.raises(GateError, match=r"^x has 1 values .* first at \(2, 3\)"):
        layer(x_TD)
    assert isinstance(layer.gate, NoisyTopK)
    layer.gate.w_noise_DE.data[1, 4] = bad
    with pytest.raises(GateError, match=r"gate\.w_noise_DE has 1 values .* first at \(1, 4\)"):
        layer(torch.randn(5, 8))


def test_debug_mode_looks_at_buffers_too() -> None:
    gate = LossFreeBias(6, 2)
    layer = MoE(8, gate, LocalExperts(6, 8, 12), debug=True)
    gate.bias_E[4] = torch.nan
    with pytest.raises(GateError, match=r"^gate\.bias_E has 1 values .* first at \(4,\)"):
        layer(torch.randn(5, 8))


def test_debug_mode_names_what_finite_numbers_overflow_to() -> None:
    layer = layer_of(NoisyTopK(6, 2)).eval()
    layer.debug = True
    assert isinstance(layer.gate, NoisyTopK) and isinstance(layer.experts, LocalExperts)
    layer.experts.w_out_EHD.data.fill_(3e38)
    with pytest.raises(GateError, match=r"^expert results has .* first at"):
        layer(torch.randn(5, 8))
    layer.gate.w_gate_DE.data.fill_(3e38)
    with pytest.raises(GateError, match=r"^gate weights has .* first at"):
        layer(torch.ones(5, 8))
