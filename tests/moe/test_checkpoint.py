from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moa_ray.moe import CheckpointError
from moa_ray.moe.checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint
from moa_ray.moe.text import Vocabulary


def checkpoint(step: int) -> Checkpoint:
    tensors = {"w": torch.full((2, 3), float(step))}
    words = Vocabulary("word", ("a", "<unk>"))
    return Checkpoint(step, {"d_model": 3}, words, "9 tokens", tensors, {"r": torch.arange(4)})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(7), keep=1)
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.model_config, loaded.reads) == (7, {"d_model": 3}, "9 tokens")
    assert loaded.vocabulary == checkpoint(7).vocabulary
    assert torch.equal(loaded.model["w"], checkpoint(7).model["w"])
    assert torch.equal(loaded.run["r"], torch.arange(4))


def test_only_the_newest_are_kept_and_a_directory_means_its_newest(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        save_checkpoint(tmp_path / "checkpoints", checkpoint(step), keep=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000030"]
    assert load_checkpoint(tmp_path).step == load_checkpoint(tmp_path / "checkpoints").step == 30


def test_a_save_that_broke_off_is_not_seen(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    (tmp_path / ".step-00000002.partial").mkdir()
    assert load_checkpoint(tmp_path).step == 1
    save_checkpoint(tmp_path, checkpoint(2), keep=2)
    assert load_checkpoint(tmp_path).step == 2


def test_no_checkpoint_and_a_damaged_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no checkpoint here"):
        load_checkpoint(tmp_path)
    for name in ("model.safetensors", "run.safetensors", "run.json"):
        for damage in (b"not what it was", b"[]", b"{}", b""):
            path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
            (path / name).write_bytes(damage)
            with pytest.raises(CheckpointError, match=r"step-00000001.*: damaged checkpoint"):
                load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("saved", "complaint"),
    [
        (
            {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)},
            r"weight has shape \(2, 4\) .*, \(2, 3\) in the model",
        ),
        ({"weight": torch.zeros(2, 3)}, "lacks bias"),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "x": torch.zeros(1)},
            "has x, which the model lacks",
        ),
    ],
)
def test_tensors_of_another_model_are_named(saved: dict[str, torch.Tensor], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        load_weights(torch.nn.Linear(3, 2), saved)
