"""The file of a LangGraph, which is written without LangGraph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moa_ray.errors import SpecError
from moa_ray.graph import from_dict
from moa_ray.integrations.langgraph import source
from tests.runtime.panels import panel

SERVER = "http://127.0.0.1:8000/v1"


def _free(*names: str) -> Any:
    """A graph of nodes that see each the one before."""
    nodes = {name: {"agent": "a1", "inputs": list(names[:n][-1:])} for n, name in enumerate(names)}
    return from_dict(
        {
            "version": 1,
            "name": "free",
            "engines": {"script": {"kind": "scripted", "model": "script"}},
            "agents": {"a1": {"engine": "script"}, "chief": {"engine": "script"}},
            "nodes": nodes,
            "aggregator": "chief",
        }
    )


def test_it_names_each_step_and_whose_texts_it_is_shown() -> None:
    lines = source(panel(2, 1)[0].graph, SERVER).splitlines()
    assert 'builder.add_node("2/a1", ask(model, "2/a1", shown=["1/a1", "1/a2"]))' in lines
    assert 'builder.add_edge(["1/a1", "1/a2"], "2/a1")' in lines


def test_it_says_at_its_head_what_is_lost() -> None:
    lost = {"policy": {"streaming": "staircase", "grace_s": 2}}
    head = source(panel(2, spec=lost)[0].graph, SERVER).split("import")[0]
    assert "#   policy.streaming: staircase" in head and "#   policy.grace_s: 2" in head
    assert "#   nodes: " not in head and "#   nodes: " in source(_free("x", "y"), SERVER)


@pytest.mark.parametrize("name", ["messages", "texts"])
def test_a_node_with_a_name_of_the_states_is_told_at_export(name: str) -> None:
    with pytest.raises(SpecError, match=rf"nodes\.{name}"):
        source(_free("x", name), SERVER)


@pytest.mark.parametrize("server", [SERVER, 'http://host/"v1\\'])
def test_it_is_python_with_the_server_as_it_was_given(server: str) -> None:
    assert repr(server) in repr(compile(source(_free("x"), server), "free.py", "exec").co_consts)


def test_it_is_as_ruff_would_have_it(tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    (tmp_path / "free.py").write_text(source(_free("x", "y"), SERVER))
    for check in (["format", "--check"], ["check", "--select", "E,F,I"]):
        settings = ["--isolated", "--no-cache", "--line-length", "120"]
        command = [sys.executable, "-m", "ruff", *check, *settings, str(tmp_path / "free.py")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout
