"""Airflow for tests: graphs on a real moa-ray server, and a whole Airflow in processes of its own."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from pydantic import SecretStr

from moa_ray.client import Client
from moa_ray.engines import Scripted
from moa_ray.graph import Graph, from_dict
from moa_ray.server import ServerSettings, create_app
from tests.conftest import until
from tests.http import answering, free_port
from tests.runtime.panels import SHAPES, runner
from tests.server.local import LocalBackend


def graph(name: str, *faults: Mapping[str, Any], ttft_s: float = 0.0, **spec: Any) -> Graph:
    """A graph of agents `a` (two samples), `b`, `c` and the aggregator `chief`, on a scripted engine of its own."""
    agents = {"a": {"samples": 2}, "b": {}, "c": {}, "chief": {}} | spec.pop("agents", {})
    shape = {"layers": [["a", "b"], ["b", "c"]], "aggregator": "chief"} if "aggregator" not in spec else {}
    used = {each: {"engine": "script", **options} for each, options in agents.items() if options is not None}
    engine = {"kind": "scripted", "model": "script", "faults": list(faults), "ttft_s": ttft_s}
    return from_dict({"version": 1, "name": name, "engines": {"script": engine}, "agents": used, **shape, **spec})


NODES = SHAPES["nodes"]["nodes"]
VOTE = {"layers": [["a", "b", "c"]], "aggregator": {"vote": {"extract": "number"}}, "agents": {"chief": None}}


class Served:
    """A server of graphs: its base URL, and the engine of each graph."""

    def __init__(self, url: str, graphs: Mapping[str, Graph], engines: Mapping[str, Scripted]) -> None:
        self.url = url
        self.graphs = graphs
        self.engines = engines

    def asked(self, graph: str) -> list[str]:
        """Who was asked, by name."""
        return sorted(call.agent for call in self.engines[graph].calls)

    def whole(self, graph: str, question: str) -> str:
        """The answer of a whole run."""
        with Client(self.url, api_key="sesame") as client:
            return client.run(question, model=graph).text


@contextmanager
def serving(*graphs: Graph) -> Iterator[Served]:
    """These graphs behind HTTP on loopback, for those who have the key `sesame`."""
    runners = {graph.spec.name: runner(graph) for graph in graphs}
    backend = LocalBackend(*(each for each, _ in runners.values()))
    with answering(create_app(backend, ServerSettings(api_keys=(SecretStr("sesame"),)))) as url:
        engines = {name: engine for name, (_, engine) in runners.items()}
        yield Served(f"{url}/v1", {graph.spec.name: graph for graph in graphs}, engines)


def environment(home: Path) -> dict[str, str]:
    """Variables of an Airflow that lives in `home` alone, and on loopback."""
    (home / "dags").mkdir(parents=True)
    port = free_port()
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
        "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "10",
        "MOA_RAY_API_KEY": "sesame",
    }


class Airflow:
    """API server, DAG processor, scheduler and triggerer, a process each, over SQLite.

    Args:
        home: Where it lives.
    """

    def __init__(self, home: Path) -> None:
        self.dags = home / "dags"
        self._home = home
        self._env = environment(home)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        url = f"http://127.0.0.1:{self._env['AIRFLOW__API__PORT']}/api/v2"
        self._http = httpx2.Client(base_url=url, timeout=60)

    def command(self, *words: str) -> str:
        """Run a command of its command line; what it printed."""
        done = subprocess.run(self._words(*words), env=self._all(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, name: str, *options: str) -> None:
        """Start a process."""
        with (self._home / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._words(name, *options), env=self._all(), stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End a process, and all that it started."""
        process = self._processes.pop(name)
        os.killpg(process.pid, how)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)

    def close(self) -> None:
        """End all processes, each politely at first."""
        for name in list(self._processes):
            self.kill(name, signal.SIGTERM)
        self._http.close()

    def dag_ids(self) -> list[str]:
        """The DAGs that it knows; none while it starts."""
        try:
            found = self._http.get("/dags")
        except httpx2.TransportError:
            return []
        return [dag["dag_id"] for dag in found.json()["dags"]]

    def get(self, path: str) -> Any:
        """What its API says."""
        return self._http.get(path).raise_for_status().json()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What its API says to a change."""
        return self._http.post(path, json=body).raise_for_status().json()

    def trigger(self, dag: str, question: str) -> str:
        """Start a run; its path."""
        body = {"logical_date": None, "conf": {"question": question}}
        return f"/dags/{dag}/dagRuns/{self.post(f'/dags/{dag}/dagRuns', body)['dag_run_id']}"

    def ended(self, run: str) -> str:
        """Wait for the end of a run; its state."""
        until(lambda: self.get(run)["state"] in ("success", "failed"), within_s=300)
        return str(self.get(run)["state"])

    def result(self, run: str, task: str) -> Any:
        """What a task that is not mapped left."""
        return self.get(f"{run}/taskInstances/{task}/xcomEntries/return_value")["value"]

    def tasks(self, run: str, key: str) -> dict[str, Any]:
        """What the API says under `key` of each task, by what the task is called there."""
        rows = self.get(f"{run}/taskInstances")["task_instances"]
        return {row["rendered_map_index"] or row["task_id"]: row[key] for row in rows}

    def _all(self) -> dict[str, str]:
        return {**os.environ, **self._env}

    def _words(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "airflow", *words]
