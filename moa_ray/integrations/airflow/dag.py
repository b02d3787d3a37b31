"""A graph as a native DAG."""

from __future__ import annotations

from datetime import timedelta
from itertools import groupby
from os import PathLike
from typing import Any

from airflow.sdk import DAG, Param, TaskGroup

from moa_ray.graph import Graph, load
from moa_ray.integrations.airflow.hook import MoAHook
from moa_ray.integrations.airflow.operator import MoAOperator
from moa_ray.integrations.airflow.tasks import Task, before, node_of, tasks_of
from moa_ray.integrations.steps import step_by_step


def moa_dag(
    spec: str | PathLike[str] | Graph, *, conn_id: str = MoAHook.default_conn_name, server: str = "", **dag: Any
) -> DAG:
    """The DAG of a graph, to be bound to a name in a file of the DAGs folder.

    Its layers are task groups `layer_1`, `layer_2`, ..., its agents tasks in them, mapped over their samples, and
    the task `answer` has the answer as its result. The question is the run's parameter `question`. What Airflow
    cannot express of the graph stands in the DAG's documentation.

    Args:
        spec: A YAML file, or a graph; a server must serve it under its name.
        conn_id: A connection of type `moa_ray`.
        server: The server's base URL in its place; the key comes from the environment variable MOA_RAY_API_KEY.
        **dag: What `DAG` takes, in place of what is set here.

    Raises:
        SpecError: If the file is wrong.
    """
    graph = spec if isinstance(spec, Graph) else load(spec)
    steps, lost = step_by_step(graph)
    settings: dict[str, Any] = {
        "dag_id": graph.spec.name,
        "description": graph.spec.description or None,
        "schedule": None,
        "doc_md": "\n".join(["Not as the graph has it:", "", *(f"- {line}" for line in lost)]),
        "params": {"question": Param(type="string", minLength=1)},
    }
    defaults = {"retry_delay": timedelta(seconds=5), **dag.pop("default_args", {})}
    with DAG(**settings | dag, default_args=defaults) as made:
        question = "{{ params.question }}"
        common = {"question": question, "model": graph.spec.name, "conn_id": conn_id, "server": server}
        _build(tasks_of(steps), common)
    return made


def _build(tasks: tuple[Task, ...], common: dict[str, Any]) -> None:
    *proposers, answer = tasks
    said: dict[str, Any] = {}
    for number, layer in groupby(proposers, lambda task: task.layer):
        with TaskGroup(f"layer_{number}"):
            for task in layer:
                settings = {**common, **_settings(task, said), "map_index_template": "{{ task.call }}"}
                asking = MoAOperator.partial(task_id=task.name, **settings).expand(call=list(task.calls))
                said[node_of(task.step.id)] = asking.output
    MoAOperator(task_id="answer", call="answer", **common, **_settings(answer, said))


def _settings(task: Task, said: dict[str, Any]) -> dict[str, Any]:
    return {
        "proposals": [said[node] for node in before(task)],
        "trigger_rule": "all_done_min_one_success" if task.spares else "all_success",
        "retries": task.step.retries,
        "execution_timeout": timedelta(seconds=task.step.timeout_s),
    }
