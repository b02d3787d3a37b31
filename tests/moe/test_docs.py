"""What the documentation shows runs as it stands, and its defaults are the real ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa_ray.moe.config import TrainConfig

PAGE = (Path(__file__).parents[2] / "docs" / "moe.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "docs/moe.md", "exec"), {})
    assert "max_over_mean_load" in capsys.readouterr().out


def test_the_training_file_shows_every_key_with_its_default() -> None:
    shown = yaml.safe_load(blocks("yaml")[0])
    middle = shown["model"]["middle"]
    needed: dict[str, Any] = {
        "data": {"train": "corpus.txt"},
        "model": {"d_model": 64, "middle": {"kind": "moe", "d_hidden": 128, "gate": {**GATE}}},
        "steps": 2000,
        "output": "runs/mine",
    }
    assert TrainConfig.model_validate(shown) == TrainConfig.model_validate(needed)
    assert shown == TrainConfig.model_validate(needed).model_dump(mode="json")
    assert middle["gate"].keys() > GATE.keys()


GATE = {"kind": "noisy_top_k", "experts": 32}
