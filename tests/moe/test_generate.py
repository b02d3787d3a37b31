from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moa_ray.moe import CheckpointError, ConfigError
from moa_ray.moe.generate import generate, load_model
from moa_ray.moe.train import train


def test_a_trained_model_continues_its_text(config_file: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config_file(steps=600, eval_every=600, log_every=600, checkpoint_every=600), show=False)
    assert generate(run, "the cat sat on th", tokens=2, temperature=0) == "e "
    first, again, other = (generate(run, "the", tokens=40, temperature=1.0, seed=s) for s in (0, 0, 1))
    assert first == again != other
    assert generate(run, "", tokens=5)
    assert generate(run, "the", tokens=0) == ""
    with pytest.raises(ConfigError, match="must not be negative"):
        generate(run, "the", temperature=-1)
    model, vocabulary = load_model(run)
    assert not model.training and len(vocabulary) == 256


def test_a_directory_without_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        generate(tmp_path, "the")
