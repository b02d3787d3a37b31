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
    assert generate(run, "the cat sat on th", tokens=2, temperature=1e-300) == "e "
    assert generate(run, b"\xff\xfe".decode(errors="surrogateescape"), tokens=5)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite and not negative"):
            generate(run, "the", temperature=temperature)
    model, vocabulary = load_model(run)
    assert not model.training and len(vocabulary) == 256


def test_at_word_level_a_prompt_without_words_begins_after_a_newline(
    config_file: Callable[..., Path], tmp_path: Path
) -> None:
    data = {"train": str(tmp_path / "corpus.txt"), "level": "word", "streams": 2, "window": 4, "valid_fraction": 0.1}
    train(config_file(data=data, steps=2), show=False)
    texts = {generate(tmp_path / "run", prompt, tokens=5) for prompt in ("", "  ", "\n")}
    assert len(texts) == 1 and texts.pop().startswith(" ")


def test_a_checkpoint_whose_model_cannot_be_built_is_named(config_file: Callable[..., Path], tmp_path: Path) -> None:
    facts = train(config_file(steps=1), show=False).checkpoint / "run.json"
    facts.write_text(facts.read_text().replace('"noisy_top_k"', '"nosy_top_k"'))
    with pytest.raises(CheckpointError, match=r"run: the checkpoint's model cannot be built"):
        generate(tmp_path / "run", "the")


def test_a_directory_without_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        generate(tmp_path, "the")
