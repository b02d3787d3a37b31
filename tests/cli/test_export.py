from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.commands import ROOT, moa_ray
from tests.engines.test_registry import SPEC
from tests.test_docs import commands

ENGINES = ["airflow", "langgraph", "prefect"]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "panel.yaml"
    path.write_text(SPEC + "policy: {streaming: staircase}\n")
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_for_another_engine_is_python_and_tells_what_that_engine_cannot_express(
    spec: Path, tmp_path: Path, engine: str
) -> None:
    out = tmp_path / "flow.py"
    done = moa_ray("export", str(spec), "--to", engine, "--server", "http://10.0.0.1:8000/v1", "--out", str(out))
    assert done.returncode == 0 and done.stdout == ""
    assert f"not in {engine}: policy.streaming: staircase" in done.stderr
    text = out.read_text()
    ast.parse(text)
    assert "policy.streaming: staircase" in text and "answer" in text


def test_mermaid_is_a_drawing(spec: Path) -> None:
    assert moa_ray("export", str(spec), "--to", "mermaid").stdout.startswith("flowchart LR")


def test_an_engine_that_there_is_not_and_a_file_that_cannot_be_written_are_refused(spec: Path) -> None:
    assert moa_ray("export", str(spec), "--to", "airflaw").returncode == 2
    done = moa_ray("export", str(spec), "--to", "mermaid", "--out", "/nowhere/x.mmd")
    assert done.returncode == 2 and "--out cannot be written: /nowhere/x.mmd: No such file" in done.stderr


def test_the_commands_of_the_docs_write_their_files(tmp_path: Path) -> None:
    (tmp_path / "panel.yaml").write_text(SPEC)
    (tmp_path / "dags").mkdir()
    told = commands(ROOT / "docs" / "integrations.md")
    for command in told:
        done = moa_ray(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    files = [command[-1] for command in told if "--out" in command]
    assert len(files) == 3 and all((tmp_path / file).stat().st_size for file in files)
