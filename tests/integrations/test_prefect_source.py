"""What is written for Prefect where there is none; tests/integrations/test_prefect.py runs it."""

from __future__ import annotations

import ast
from importlib.util import find_spec

import pytest

from moa_ray.errors import MoARayError
from moa_ray.graph import Graph
from moa_ray.integrations import prefect
from moa_ray.integrations.prefect.export import version
from tests.runtime.panels import panel


def graph(**keys: object) -> Graph:
    return panel(2, 1, spec=keys)[0].graph


def test_a_file_names_every_step_with_what_it_sees_and_what_is_lost() -> None:
    text = prefect.source(graph(policy={"quorum": 1, "grace_s": 2, "retries": 3}), "http://127.0.0.1:8000/v1")
    assert 'said["2/a1"] = ask.with_options(retries=3, timeout_seconds=600).submit(\n' in text
    assert 'SERVER, GRAPH, "2/a1", question, seen(said, "1/a1", "1/a2"), version=VERSION' in text
    assert "# - policy.grace_s: 2: " in text and 'MoAServer(url="http://127.0.0.1:8000/v1")' in text


@pytest.mark.parametrize(
    ("name", "function"), [("my-panel.v2", "my_panel_v2"), ("3x", "graph_3x"), ("flow", "flow_"), ("class", "class_")]
)
def test_a_flow_is_called_as_its_graph_where_python_allows(name: str, function: str) -> None:
    text = prefect.source(graph(name=name), "http://127.0.0.1:8000/v1")
    (defined,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert defined.name == function and f"print({function}(sys.argv[1]))" in text


def test_what_is_kept_belongs_to_one_version_of_a_graph() -> None:
    assert version(graph()) == version(graph()) != version(graph(policy={"retries": 2}))


@pytest.mark.skipif(find_spec("prefect") is not None, reason="Prefect is here")
def test_without_prefect_the_extra_is_named_where_prefect_is_needed() -> None:
    with pytest.raises(MoARayError, match=r"(?s)prefect 3\.9 or newer.*moa-ray\[prefect\]"):
        _ = prefect.moa_flow
