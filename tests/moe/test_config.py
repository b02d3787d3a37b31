from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_ray.gating import Gate, Hierarchical, LossFreeBias, NoisyTopK, SoftmaxTopK, StrictlyBalanced
from moa_ray.moe import ConfigError, LanguageModel
from moa_ray.moe.config import ModelConfig, OptimConfig, load_config
from moa_ray.moe.model import DenseLayer, LSTMLayer, MoELayer

Write = Callable[..., Path]
DATA = {"train": "x", "streams": 1, "window": 1}
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "moe").glob("*.yaml"))
MIDDLE = {"kind": "moe", "gate": {"kind": "noisy_top_k", "experts": 4}, "d_hidden": 8}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"stepz": 3}, "stepz: Extra inputs"),
        ({"data": DATA | {"widow": 1}}, r"data\.widow: Extra inputs"),
        ({"steps": 0}, "steps: Input should be greater"),
        ({"model": {"d_model": 8, "middle": {"kind": "mow"}}}, r"model\.middle: .*'mow'"),
        ({"model": {"d_model": 8, "dropout": 1.5, "middle": MIDDLE}}, r"model\.dropout: "),
        (
            {"model": {"d_model": 8, "middle": MIDDLE | {"gate": {"experts": 2}}}},
            r"model\.middle\.moe\.gate: ",
        ),
        (
            {"model": {"d_model": 8, "middle": MIDDLE | {"gate": {"kind": "loss_free", "experts": 4, "k": 9}}}},
            r"gate\.loss_free: .*k=9 experts of a token cannot be chosen from 4",
        ),
        ({"stepz": 3, "steps": 0}, r"steps: .*; .*stepz: "),
        ({"sampled_softmax": 8}, r"file: sampled_softmax needs data\.level: word"),
        ({"seed": 2**70}, "seed: "),
        ({"model": {"d_model": 8, "middle": MIDDLE | {"capacity_factor": float("inf")}}}, "capacity_factor: .*finite"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(config_file: Write, changes: dict[str, Any], complaint: str) -> None:
    path = config_file(**changes)
    with pytest.raises(ConfigError, match=rf"{path}: .*{complaint}"):
        load_config(path)


def test_a_file_that_is_missing_or_not_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("steps: [1")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"list\.yaml: file: "):
        load_config(tmp_path / "list.yaml")


def build(middle: dict[str, Any]) -> LanguageModel:
    return ModelConfig.model_validate({"d_model": 8, "middle": middle}).build(vocab_size=5)


@pytest.mark.parametrize(
    ("gate", "kind"),
    [
        ({"kind": "noisy_top_k", "experts": 4, "k": 2}, NoisyTopK),
        ({"kind": "hierarchical", "groups": 2, "group_size": 2}, Hierarchical),
        ({"kind": "strictly_balanced", "experts": 4, "k": 2}, StrictlyBalanced),
        ({"kind": "loss_free", "experts": 4, "k": 2}, LossFreeBias),
        ({"kind": "softmax_top_k", "experts": 4, "k": 2}, SoftmaxTopK),
    ],
)
def test_every_gate_kind_builds_and_runs(gate: dict[str, Any], kind: type[Gate]) -> None:
    model = build({"kind": "moe", "gate": gate, "d_hidden": 8, "shared_hidden": 4, "capacity_factor": 2.0})
    layer = model.stack.layers[1]
    assert isinstance(layer, MoELayer) and isinstance(layer.moe.gate, kind)
    logits_SBV, _ = model(torch.zeros(3, 2, dtype=torch.int64))
    assert logits_SBV.shape == (3, 2, 5)


def test_dense_and_lstm_controls_build() -> None:
    assert isinstance(build({"kind": "dense", "hidden": [8]}).stack.layers[1], DenseLayer)
    assert [type(x) for x in build({"kind": "lstm", "layers": 2}).stack.layers] == [LSTMLayer] * 4


def test_balancing_weights_reach_the_gate() -> None:
    gate = {"kind": "noisy_top_k", "experts": 4, "w_importance": 0.3, "w_load": 0.0}
    layer = build({"kind": "moe", "gate": gate, "d_hidden": 8}).stack.layers[1]
    assert isinstance(layer, MoELayer) and isinstance(layer.moe.gate, NoisyTopK)
    assert (layer.moe.gate.w_importance, layer.moe.gate.w_load) == (0.3, 0.0)


def test_the_rate_rises_linearly_and_falls_with_the_inverse_square_root() -> None:
    rate = OptimConfig(lr=1.0, warmup_steps=100).rate
    assert rate(0) == pytest.approx(0.01)
    assert rate(49) == pytest.approx(0.5)
    assert rate(99) == pytest.approx(1.0)
    assert rate(399) == pytest.approx(0.5)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_valid(example: Path) -> None:
    load_config(example).model.build(vocab_size=10)
