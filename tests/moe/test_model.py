from __future__ import annotations

import pytest
import torch

from moa_ray.gating import NoisyTopK
from moa_ray.moe import LanguageModel, LocalExperts, MoE
from moa_ray.moe.model import DenseLayer, Layer, LSTMLayer, MoELayer, detach_state

D, V = 8, 11


def moe_layer() -> MoELayer:
    return MoELayer(MoE(D, NoisyTopK(4, 2), LocalExperts(4, D, 8)))


def model_with(middle: list[Layer], dropout: float = 0.0) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(V, D, [LSTMLayer(D), *middle, LSTMLayer(D)], dropout)


def test_layers_are_wired_as_in_appendix_c() -> None:
    middle = moe_layer()
    model = model_with([middle]).eval()
    tokens_SB = torch.randint(V, (5, 3))
    first, _, last = model.stack.layers
    assert isinstance(first, LSTMLayer) and isinstance(last, LSTMLayer)
    embedded = model.embedding(tokens_SB)
    a = embedded + first.lstm(embedded)[0]
    b = a + torch.sigmoid(middle.moe(a)[0])
    c = b + last.lstm(b)[0]
    torch.testing.assert_close(model(tokens_SB)[0], model.softmax(c))


def test_a_text_in_two_windows_gives_what_it_gives_in_one() -> None:
    model = model_with([moe_layer()]).eval()
    tokens_SB = torch.randint(V, (10, 2))
    whole, _ = model(tokens_SB)
    first, state = model(tokens_SB[:4])
    second, _ = model(tokens_SB[4:], detach_state(state))
    torch.testing.assert_close(torch.cat([first, second]), whole)


def test_no_step_sees_later_tokens() -> None:
    model = model_with([moe_layer()]).eval()
    tokens_SB = torch.randint(V, (6, 1))
    changed_SB = tokens_SB.clone()
    changed_SB[4:] = (changed_SB[4:] + 1) % V
    torch.testing.assert_close(model(tokens_SB)[0][:4], model(changed_SB)[0][:4])


def test_dropout_acts_before_the_residual_so_dropping_everything_leaves_the_identity() -> None:
    model = model_with([moe_layer()])
    model.stack.dropout.p = 1.0
    x_SBD = torch.randn(3, 2, D)
    torch.testing.assert_close(model.stack(x_SBD)[0], x_SBD)


@pytest.mark.parametrize("hidden", [[32], [8, 8, 8, 8]])
def test_dense_controls_end_in_the_same_sigmoid(hidden: list[int]) -> None:
    y_SBD, _, aux = DenseLayer(D, hidden)(torch.randn(3, 2, D), None)
    assert aux is None and y_SBD.shape == (3, 2, D)
    assert (y_SBD > 0).all() and (y_SBD < 1).all()


def test_every_parameter_of_the_model_is_trained() -> None:
    model = model_with([moe_layer(), DenseLayer(D, [8, 8]), LSTMLayer(D)])
    x_SBD, _, said = model.features(torch.randint(V, (20, 8)))
    (model.softmax(x_SBD).logsumexp(-1).sum() + said[0].loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
