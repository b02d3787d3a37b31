"""A graph written out as a file for Airflow's DAGs folder. Needs no Airflow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from textwrap import indent

from moa_ray.graph import Graph
from moa_ray.integrations.airflow.tasks import Task, before, node_of, tasks_of
from moa_ray.integrations.steps import step_by_step


def source(graph: Graph, server: str) -> str:
    """The text of a Python file with the DAG that `moa_dag` makes, each task on lines of its own.

    Args:
        graph: The graph.
        server: Base URL of the server, `/v1` included.
    """
    steps, lost = step_by_step(graph)
    *proposers, answer = tasks_of(steps)
    names = _names(proposers)
    layers = groupby(proposers, lambda task: task.layer)
    body = [line for number, layer in layers for line in _layer(number, layer, names)]
    body += [*_call("MoAOperator", answer, names, 'call="answer"'), ")"]
    return _FILE.format(
        name=graph.spec.name,
        lost="\n".join(f"# - {line}" for line in lost),
        server=json.dumps(server),
        body=indent("\n".join(body), "    "),
    )


def _names(tasks: Iterable[Task]) -> dict[str, str]:
    """Names of variables by node; those that differ in their punctuation alone get a `_` more."""
    names: dict[str, str] = {}
    for task in tasks:
        name = re.sub(r"\W", "_", f"layer_{task.layer}_{task.name}")
        while name in names.values():
            name += "_"
        names[node_of(task.step.id)] = name
    return names


def _layer(number: int, tasks: Iterable[Task], names: Mapping[str, str]) -> Iterable[str]:
    yield f'with TaskGroup("layer_{number}"):'
    for task in tasks:
        head = f"{names[node_of(task.step.id)]} = MoAOperator.partial"
        lines = _call(head, task, names, 'map_index_template="{{ task.call }}"')
        yield from (f"    {line}" for line in lines)
        yield f"    ).expand(call=[{', '.join(json.dumps(call) for call in task.calls)}])"


def _call(head: str, task: Task, names: Mapping[str, str], extra: str) -> Iterable[str]:
    """Lines of a call, but for the parenthesis that closes it."""
    yield f"{head}("
    yield f'    task_id="{task.name}",'
    yield f"    {extra},"
    if inputs := before(task):
        yield "    proposals=["
        yield from (f"        {names[node]}.output," for node in inputs)
        yield "    ],"
    if task.spares:
        yield '    trigger_rule="all_done_min_one_success",'
    yield f"    retries={task.step.retries},"
    yield f"    execution_timeout=timedelta(seconds={task.step.timeout_s:g}),"
    yield "    **ASK,"


_FILE = '''\
"""The graph {name} as a DAG of Airflow 3. Written by `moa-ray export --to airflow`, to be changed as you like.

    airflow dags trigger {name} --conf '{{"question": "Why is the sky blue?"}}'
"""

# Not as the graph has it:
{lost}

from datetime import timedelta

from airflow.sdk import DAG, Param, TaskGroup

from moa_ray.integrations.airflow import MoAOperator

ASK = {{
    "question": "{{{{ params.question }}}}",
    "model": "{name}",
    # The key: that of MOA_RAY_API_KEY, in the workers and the triggerer. Or, in place of both, a connection of
    # type moa_ray: "conn_id": "its id".
    "server": {server},
    "retry_delay": timedelta(seconds=5),
}}

with DAG("{name}", schedule=None, params={{"question": Param(type="string", minLength=1)}}) as dag:
{body}
'''
