from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moa_ray import __version__
from moa_ray.cli import main
from tests.commands import moa_ray
from tests.engines.test_registry import SPEC


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "g.yaml"
    path.write_text(SPEC)
    return path


def test_validate_tells_what_the_graph_holds(spec: Path) -> None:
    done = moa_ray("validate", str(spec))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{spec}: ok: g: 1 layer, 2 agents, 1 engine, 2 calls a request\n"
    assert json.loads(moa_ray("validate", str(spec), "--json").stdout)["calls"] == 2


def test_a_mistake_is_one_clear_line_and_exit_2(spec: Path) -> None:
    spec.write_text(SPEC.replace("engine: s}, chief", "engine: z}, chief"))
    done = moa_ray("run", str(spec), "why?")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {spec}:5: agents.a.engine: there is no engine 'z'\nhint:  there are: s\n"


def test_an_empty_prompt_is_exit_2_before_anything_starts(spec: Path) -> None:
    done = moa_ray("run", str(spec), "-", stdin="  \n")
    assert (done.returncode, done.stderr) == (2, "error: the prompt is empty\nhint:  write a question\n")


def test_a_missing_model_file_names_file_line_and_key(spec: Path) -> None:
    spec.write_text(SPEC.replace("kind: scripted, model: m", "kind: llamacpp, model: /nowhere/m.gguf"))
    done = moa_ray("run", str(spec), "why?")
    assert done.returncode == 1
    assert f"{spec}:4: engines.s.model: there is no model file /nowhere/m.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_graph_draws_to_stdout_or_a_file(spec: Path, tmp_path: Path) -> None:
    assert "▶ chief (s) ────▶ answer" in moa_ray("graph", str(spec)).stdout
    assert moa_ray("graph", str(spec), "-f", "mermaid").stdout.startswith("flowchart LR")
    out = tmp_path / "g.svg"
    assert moa_ray("graph", str(spec), "--format", "svg", "--out", str(out)).returncode == 0
    assert out.read_text().startswith("<svg")
    assert "cannot be written" in moa_ray("graph", str(spec), "--out", str(tmp_path / "no" / "g")).stderr


def test_schema_and_models_are_json_and_the_version_is_told() -> None:
    assert json.loads(moa_ray("schema").stdout)["title"] == "GraphSpec"
    assert json.loads(moa_ray("models", "list", "--json").stdout)[0]["name"] == "smollm2-135m-instruct"
    assert "smollm2-135m-instruct" in moa_ray("models", "list").stdout
    assert moa_ray("--version").stdout == f"moa-ray {__version__}\n"
    assert moa_ray("models", "pull", "no-such-model").returncode == 1


def test_importing_moa_ray_loads_nothing_heavy() -> None:
    code = "import sys, moa_ray; print([m for m in ('ray', 'torch', 'openai', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("command", "extra"), [("gate", "gate"), ("eval", "eval"), ("tune", "eval")])
def test_what_a_command_lacks_is_named_by_its_own_extra(
    command: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks() -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(main, "app", lacks)
    monkeypatch.setattr("sys.argv", ["moa-ray", command])
    with pytest.raises(SystemExit):
        main.main()
    assert f"pip install 'moa-ray[{extra}]'" in capsys.readouterr().err
