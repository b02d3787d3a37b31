"""The plug-in in a real Airflow, whose own runner of tests runs tasks and triggers in this process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from moa_ray.integrations.airflow import source
from tests.integrations.airflows import NODES, VOTE, Served, environment, graph, serving

if importlib.util.find_spec("airflow") is None:  # imported below, once its home is known
    pytest.skip("Airflow is not installed here", allow_module_level=True)

QUESTION = "Why {{ 1 + 1 }}?"
"""Whatever looks like a template in a question stays as it is."""


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the Airflow of this process lives, its tables made."""
    where = tmp_path_factory.mktemp("airflow") / "home"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(where).items():
            patch.setenv(name, value)
        from airflow.utils.db import initdb

        initdb()
        yield where


@pytest.fixture
def serve() -> Iterator[Any]:
    """Serves graphs until the test's end."""
    with ExitStack() as stack:
        yield lambda *graphs: stack.enter_context(serving(*graphs))


def run(served: Served, name: str, home: Path, **options: Any) -> tuple[str, dict[str, str], Any]:
    """Run the DAG of a graph: the run's state, those of the tasks, and the answer."""
    from moa_ray.integrations.airflow import moa_dag

    # Airflow's runner wants the DAG in its folder, too.
    (home / "dags" / f"{name}.py").write_text(source(served.graphs[name], served.url))
    options = {"server": served.url, "default_args": {"retry_delay": 0, **options.pop("default_args", {})}, **options}
    done = moa_dag(served.graphs[name], **options).test(run_conf={"question": QUESTION})
    tasks = {task.rendered_map_index or task.task_id: task for task in done.get_task_instances()}
    return str(done.state), {call: str(task.state) for call, task in tasks.items()}, tasks["answer"].xcom_pull("answer")


@pytest.mark.parametrize("deferrable", [True, False])
@pytest.mark.parametrize("spec", [{}, {"nodes": NODES, "aggregator": "chief"}, VOTE], ids=["layers", "nodes", "vote"])
def test_a_dag_gives_the_text_of_a_whole_run_and_asks_everybody_once(
    home: Path, serve: Any, spec: Any, deferrable: bool
) -> None:
    name = f"same-{'-'.join(spec)}-{deferrable}"
    served = serve(graph(name, **spec))
    state, tasks, answer = run(served, name, home, default_args={"deferrable": deferrable})
    assert state == "success" and set(tasks.values()) == {"success"}
    asked = served.asked(name)
    assert answer == served.whole(name, QUESTION)
    assert served.asked(name) == sorted(asked * 2)


def test_layers_are_task_groups_and_agents_mapped_tasks_with_the_graphs_retries_and_times() -> None:
    from moa_ray.integrations.airflow import moa_dag

    policy = {"retries": 3, "deadline_s": 90, "quorum": 2}
    made = moa_dag(graph("shape", agents={"b": {"timeout_s": 7}}, policy=policy))
    assert set(made.task_group.get_task_group_dict()) == {None, "layer_1", "layer_2"}
    rows = {
        each.task_id: (each.is_mapped, each.retries, each.execution_timeout.total_seconds(), each.trigger_rule)
        for each in made.tasks
    }
    assert rows == {
        "layer_1.a": (True, 3, 90, "all_success"),
        "layer_1.b": (True, 3, 7, "all_success"),
        "layer_2.b": (True, 3, 7, "all_done_min_one_success"),
        "layer_2.c": (True, 3, 90, "all_done_min_one_success"),
        "answer": (False, 3, 90, "all_success"),
    }
    assert made.get_task("layer_2.c").upstream_task_ids == {"layer_1.a", "layer_1.b"}
    assert "policy.deadline_s: 90" in made.doc_md


def test_the_exported_file_is_the_same_dag(home: Path) -> None:
    from airflow.dag_processing.dagbag import DagBag

    from moa_ray.integrations.airflow import moa_dag

    wanted = graph("a.b-c", nodes=NODES | {"z-z": NODES["z"], "z.z": NODES["z"]}, aggregator="chief")
    (home / "exported").mkdir()
    (home / "exported" / "abc.py").write_text(source(wanted, "http://127.0.0.1:1/v1"))
    bag = DagBag(home / "exported")
    assert not bag.import_errors

    def shape(dag: Any) -> dict[str, Any]:
        names = ("question", "model", "call", "server", "proposals", "map_index_template")
        kept = ("retries", "execution_timeout", "trigger_rule", "retry_delay", "upstream_task_ids")
        rows = {}
        for task in dag.tasks:
            given = {**task.partial_kwargs, **task.expand_input.value} if task.is_mapped else vars(task)
            asked = {name: str(given.get(name) or None) for name in names}
            rows[task.task_id] = {**{name: getattr(task, name) for name in kept}, **asked}
        return rows

    assert shape(bag.dags["a.b-c"]) == shape(moa_dag(wanted, server="http://127.0.0.1:1/v1"))


def test_a_step_runs_on_those_that_did_not_fail(home: Path, serve: Any) -> None:
    refused = {"kind": "refused", "agent": "a", "times": 1}
    served = serve(graph("spare", refused), graph("whole", refused))
    state, tasks, answer = run(served, "spare", home)
    failed = [call for call, state in tasks.items() if state == "failed"]
    assert state == "success" and failed in (["1/a#1"], ["1/a#2"])
    assert answer == served.whole("whole", QUESTION)
    assert served.asked("spare") == ["a", "a", "b", "b", "c", "chief"]


def test_below_the_quorum_a_step_fails_at_once_and_asks_nobody(home: Path, serve: Any) -> None:
    served = serve(graph("few", {"kind": "refused", "agent": "a"}, policy={"quorum": 2}))
    state, tasks, answer = run(served, "few", home)
    assert (state, answer) == ("failed", None)
    assert tasks == dict.fromkeys(("1/a#1", "1/a#2", "2/b", "2/c"), "failed") | {
        "1/b": "success",
        "answer": "upstream_failed",
    }
    assert served.asked("few") == ["a", "a", "b"]


def test_without_a_required_agent_a_step_fails_though_the_quorum_is_met(home: Path, serve: Any) -> None:
    served = serve(graph("needed", {"kind": "refused", "agent": "b"}, agents={"b": {"required": True}}))
    state, tasks, _ = run(served, "needed", home)
    assert state == "failed" and (tasks["1/a#1"], tasks["2/c"]) == ("success", "failed")
    assert set(served.asked("needed")) == {"a", "b"}


def test_a_text_that_does_not_say_whose_it_is_is_no_proposal(home: Path, serve: Any) -> None:
    from airflow.sdk import DAG

    from moa_ray.integrations.airflow import MoAOperator

    served = serve(graph("bare"))
    asking = {"question": "why?", "model": "bare", "server": served.url}
    (home / "dags" / "bare.py").write_text("from airflow.sdk import DAG\n\ndag = DAG('bare')\n")
    with DAG("bare") as dag:
        draft = MoAOperator(task_id="draft", **asking)
        MoAOperator(task_id="judge", call="answer", proposals=draft.output, **asking)
    done = dag.test()
    states = {task.task_id: str(task.state) for task in done.get_task_instances()}
    assert states == {"draft": "success", "judge": "failed"}
    assert served.asked("bare").count("chief") == 1


def test_the_graphs_retries_are_the_tasks_alone(home: Path, serve: Any) -> None:
    broken = {"kind": "unavailable", "agent": "b"}
    served = serve(graph("retried", broken, policy={"retries": 2}, layers=[["b"]], aggregator="chief", agents=_ONLY_B))
    state, _, _ = run(served, "retried", home)
    assert state == "failed" and served.asked("retried") == ["b", "b", "b"]


_ONLY_B: dict[str, Any] = {"a": None, "c": None}


@pytest.mark.parametrize("deferrable", [True, False])
def test_a_connection_names_the_server_and_its_key(
    home: Path, serve: Any, deferrable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moa_ray.integrations.airflow import MoAHook

    name = f"connected-{deferrable}"
    served = serve(graph(name))
    monkeypatch.delenv("MOA_RAY_API_KEY")
    place = served.url.removeprefix("http://").removesuffix("/v1")
    monkeypatch.setenv("AIRFLOW_CONN_MOA_RAY_DEFAULT", f"moa-ray://:sesame@{place}/http")
    assert MoAHook().test_connection() == (True, f"It serves {', '.join(_models(name))}.")
    state, _, answer = run(served, name, home, server="", default_args={"deferrable": deferrable})
    assert (state, answer) == ("success", served.whole(name, QUESTION))

    monkeypatch.setenv("AIRFLOW_CONN_MOA_RAY_DEFAULT", f"moa-ray://:wrong@{place}/http")
    works, why = MoAHook().test_connection()
    assert not works and "API key" in why
    assert run(served, name, home, server="", default_args={"deferrable": deferrable})[0] == "failed"


def _models(name: str) -> list[str]:
    return [name, *(f"{name}/{agent}" for agent in ("a", "b", "c", "chief"))]


def test_airflow_knows_the_provider_and_the_form_of_its_connection() -> None:
    from airflow.providers_manager import ProvidersManager

    manager = ProvidersManager()
    assert manager.providers["moa-ray"].version == importlib.metadata.version("moa-ray")
    hook = manager.hooks["moa_ray"]
    assert hook is not None and (hook.hook_name, hook.connection_id_attribute_name) == ("moa-ray", "conn_id")
    form = manager.field_behaviours["moa_ray"]
    assert form["relabeling"] == {"schema": "Scheme", "password": "API key"}
    assert form["hidden_fields"] == ["login", "extra"]


def test_the_snippets_of_the_docs_run(home: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.dag_processing.dagbag import DagBag

    page = (Path(__file__).parents[2] / "docs" / "integrations" / "airflow.md").read_text()
    served = serve(graph("panel"))
    connection = re.search(r"export (AIRFLOW_CONN_\w+)='(.*)'", page)
    assert connection is not None
    place = served.url.removeprefix("http://").removesuffix("/v1")
    monkeypatch.setenv(connection[1], connection[2].replace("KEY", "sesame").replace("127.0.0.1:8000", place))
    spec = served.graphs["panel"].spec.model_dump(mode="json", exclude_defaults=True)
    (home / "dags" / "panel.yaml").write_text(json.dumps(spec))
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", page, re.DOTALL)):
        (home / "dags" / f"docs_{number}.py").write_text(snippet)
    dags = DagBag(home / "dags").dags
    done = dags["panel"].test(run_conf={"question": QUESTION})
    (answer,) = (task for task in done.get_task_instances() if task.task_id == "answer")
    assert answer.xcom_pull("answer") == served.whole("panel", QUESTION)
    done = dags["digest"].test()
    texts = {task.task_id: task.xcom_pull(task.task_id) for task in done.get_task_instances()}
    assert str(done.state) == "success" and texts["publish"] == texts["ask"].strip()
