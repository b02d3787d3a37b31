from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moa_ray.moe.bench
from moa_ray.cli.moe import app
from moa_ray.moe import ConfigError
from tests.moe.configs import write_config


def test_train_resume_and_generate_from_the_command_line(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    path = str(write_config(tmp_path, steps=6))
    trained = CliRunner().invoke(app, ["train", path, "--output", out, "--json"])
    assert trained.exit_code == 0, trained.output
    figures = json.loads(trained.stdout)
    assert figures["steps"] == 6 and figures["max_over_mean_load"] >= 1

    write_config(tmp_path, steps=8)
    resumed = CliRunner().invoke(app, ["train", path, "--output", out, "--resume"])
    assert resumed.exit_code == 0 and "after 8 steps" in resumed.output

    text = CliRunner().invoke(app, ["generate", out, "--prompt", "the", "--tokens", "5"])
    assert text.exit_code == 0 and text.output.startswith("the")


@pytest.mark.parametrize("as_json", [False, True])
def test_bench_prints_seconds_as_json_or_ratios(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr(moa_ray.moe.bench, "grouped_against_dense", lambda: {"dense": 0.2, "experts": 0.3})
    monkeypatch.setattr(moa_ray.moe.bench, "training_step", lambda: {"4": 0.1, "256": 0.15})
    result = CliRunner().invoke(app, ["bench", "--json"] if as_json else ["bench"])
    assert result.exit_code == 0
    if as_json:
        assert json.loads(result.stdout)["forward"] == {"dense": 0.2, "experts": 0.3}
    else:
        assert result.output.count("1.50x") == 2


def test_errors_reach_the_main_command_unchanged(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(tmp_path / "none.yaml")])
    assert isinstance(result.exception, ConfigError)
