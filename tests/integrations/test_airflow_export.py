"""What the plug-in for Airflow does without Airflow."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from moa_ray.integrations import step_by_step
from moa_ray.integrations.airflow import source
from moa_ray.integrations.airflow.tasks import before, tasks_of
from tests.integrations.airflows import NODES, VOTE, graph


def test_samples_of_one_agent_are_one_task_and_each_layer_stands_together() -> None:
    steps, _ = step_by_step(graph("free", nodes={"z": NODES["z"], **NODES, "w": {"agent": "c"}}, aggregator="chief"))
    rows = [(task.layer, task.name, task.calls, before(task), task.spares) for task in tasks_of(steps)]
    assert rows == [
        (1, "y", ("y",), (), False),
        (1, "x", ("x#1", "x#2"), (), False),
        (1, "w", ("w",), (), False),
        (2, "z", ("z",), ("y", "x"), True),
        (3, "answer", ("answer",), ("z", "w"), True),
    ]


def test_a_file_names_each_task_and_tells_what_is_lost_at_its_head() -> None:
    policy = {"streaming": "staircase", "retries": 2, "deadline_s": 30}
    text = source(graph("panel", policy=policy), "http://127.0.0.1:8000/v1")
    head, body = text.split("from datetime import")
    assert "# - policy.streaming: staircase" in head
    tasks = [line.strip() for line in body.splitlines() if "task_id=" in line]
    assert tasks == [f'task_id="{name}",' for name in ("a", "b", "b", "c", "answer")]
    assert body.count("retries=2,") == body.count("execution_timeout=timedelta(seconds=30),") == 5
    assert '.expand(call=["1/a#1", "1/a#2"])' in body


@pytest.mark.parametrize("spec", [{}, {"nodes": NODES, "aggregator": "chief"}, VOTE], ids=["layers", "nodes", "vote"])
def test_a_file_is_valid_python_whatever_names_a_graph_has(spec: dict[str, Any]) -> None:
    ast.parse(source(graph("1.class-name", **spec), 'http://"quoted"/v1'))


def test_the_entry_point_leads_to_the_provider_and_its_modules_are_there() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["apache_airflow_provider"].items()
    info = EntryPoint(name, value, "apache_airflow_provider").load()()
    modules = [*info["hooks"], *info["operators"], *info["triggers"]]
    assert all(find_spec(module) for each in modules for module in each["python-modules"])
    assert info["connection-types"][0]["hook-class-name"].rpartition(".")[0] in info["hooks"][0]["python-modules"]


@pytest.mark.parametrize("version", [None, "3.1.8"])
def test_an_airflow_that_is_missing_or_too_old_is_told_with_the_extra(tmp_path: Path, version: str | None) -> None:
    (tmp_path / "airflow").mkdir()
    if version is None:
        (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['airflow'] = None\n")
    else:
        (tmp_path / "airflow" / "__init__.py").touch()
        (tmp_path / f"apache_airflow_core-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: apache-airflow-core\nVersion: {version}\n"
        (tmp_path / f"apache_airflow_core-{version}.dist-info" / "METADATA").write_text(metadata)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    words = [sys.executable, "-c", "from moa_ray.integrations.airflow import MoAOperator"]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    found = "is not installed" if version is None else f"{version} is installed"
    assert f"apache-airflow-core 3.2 or newer is needed, and {found}" in done.stderr
    assert "pip install 'moa-ray[airflow]'" in done.stderr
