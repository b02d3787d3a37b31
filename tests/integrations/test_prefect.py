"""Graphs as Prefect flows, on a Prefect server of their own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from moa_ray.client import Client
from moa_ray.engines import Scripted
from moa_ray.errors import MoARayError, QuorumNotMet
from moa_ray.graph import Graph, from_dict, loads
from moa_ray.integrations.prefect import source
from moa_ray.server import ServerSettings, create_app
from tests.commands import ROOT
from tests.conftest import until
from tests.http import answering, free_port
from tests.runtime.panels import SHAPES, panel, runner
from tests.server.local import LocalBackend
from tests.test_docs import snippets

pytest.importorskip("prefect")
from prefect import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.events.worker import EventsWorker
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_LOGGING_TO_API_ENABLED,
    PREFECT_TASKS_REFRESH_CACHE,
    get_current_settings,
    temporary_settings,
)

from moa_ray.integrations.prefect import MoAServer, ask, moa_flow

QUESTION = "What is 6 times 7?"


def _graph(kind: str) -> Graph:
    return from_dict({**SHAPES[kind], "name": kind})


@dataclass(frozen=True, slots=True)
class _Served:
    url: str
    graph: Graph
    engine: Scripted

    @property
    def block(self) -> MoAServer:
        return MoAServer(url=self.url)

    def asked(self) -> list[str]:
        return [call.agent for call in self.engine.calls]


@contextmanager
def _serving(graph: Graph, settings: ServerSettings | None = None) -> Iterator[_Served]:
    run, engine = runner(graph)
    with answering(create_app(LocalBackend(run), settings)) as url:
        yield _Served(f"{url}/v1", graph, engine)


def _panel(*layers: int, **options: Any) -> Graph:
    return panel(*layers, **options)[0].graph


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    env = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui", "--port", str(port)]
    with (home / "server.log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as server:
        url = f"http://127.0.0.1:{port}/api"

        def answers() -> bool:
            assert server.poll() is None, (home / "server.log").read_text()
            try:
                return httpx2.get(f"{url}/health", timeout=2).is_success
            except httpx2.HTTPError:
                return False

        try:
            until(answers, within_s=120)
            yield url
            EventsWorker.drain_all()  # what this process has to tell it
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture(autouse=True)
def storage(prefect_server: str, tmp_path: Path) -> Iterator[Path]:
    """Prefect in this process, with results of this test alone."""
    results = tmp_path / "results"
    where = {PREFECT_API_URL: prefect_server, PREFECT_HOME: tmp_path, PREFECT_LOCAL_STORAGE_PATH: results}
    with temporary_settings(updates={**where, PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield results


def _environment(tmp_path: Path) -> dict[str, str]:
    """That of a process of its own, with the same server and the same results."""
    settings = {"PREFECT_API_URL": str(get_current_settings().api.url), "PREFECT_HOME": str(tmp_path)}
    return {**os.environ, **settings, "PREFECT_LOCAL_STORAGE_PATH": str(tmp_path / "results")}


def _written(graph: Graph, url: str, folder: Path) -> list[str]:
    """The command that runs the file that is written for the graph."""
    (folder / "graph.py").write_text(source(graph, url), encoding="utf-8")
    return [sys.executable, str(folder / "graph.py"), QUESTION]


def _runs(state: Any, count: int) -> dict[str, Any]:
    """A flow run's task runs by their names, once all of them are told to the server."""
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    found: dict[str, Any] = {}

    def all_told() -> bool:
        found.update({run.name: run for run in client.read_task_runs(flow_run_filter=mine)})
        return len(found) == count and all(run.state.is_final() for run in found.values())

    with get_client(sync_client=True) as client:
        until(all_told, within_s=60)
    return found


def _artifacts(state: Any) -> dict[str, Any]:
    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=mine)
    return {artifact.key: artifact for artifact in found if artifact.key}  # Prefect's own have none


@pytest.mark.parametrize("kind", SHAPES)
def test_a_graph_gives_the_same_text_as_a_flow_and_as_a_file(kind: str, tmp_path: Path) -> None:
    graph = _graph(kind)
    with _serving(graph) as whole, Client(whole.url) as client:
        expected = client.run(QUESTION).text
    with _serving(graph) as served:
        assert moa_flow(graph, served.block)(QUESTION) == expected
        assert sorted(served.asked()) == sorted(whole.asked())
    with _serving(graph) as served:
        elsewhere = {**_environment(tmp_path), "PREFECT_LOCAL_STORAGE_PATH": str(tmp_path / "other")}
        command = _written(graph, served.url, tmp_path)
        done = subprocess.run(command, env=elsewhere, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == expected.strip()
        assert sorted(served.asked()) == sorted(whole.asked())


def test_each_call_is_a_task_run_after_those_that_it_sees() -> None:
    graph = _panel(2, 1)
    with _serving(graph) as served:
        state = moa_flow(graph, served.block)(QUESTION, return_state=True)
        runs = _runs(state, 4)
    assert {name: run.state_name for name, run in runs.items()} == dict.fromkeys(
        ("1/a1", "1/a2", "2/a1", "answer"), "Completed"
    )
    sees = {name: {str(given.id) for given in run.task_inputs["proposals"]} for name, run in runs.items()}
    ids = {name: str(run.id) for name, run in runs.items()}
    assert sees == {"1/a1": set(), "1/a2": set(), "2/a1": {ids["1/a1"], ids["1/a2"]}, "answer": {ids["2/a1"]}}


def test_the_calls_of_a_layer_run_at_the_same_time() -> None:
    graph = _panel(3, spec={"engines": {"script": {"kind": "scripted", "model": "script", "ttft_s": 3}}})
    with _serving(graph) as served, ThreadPoolExecutor() as pool:
        together = pool.submit(until, lambda: served.engine.active == 3)
        moa_flow(graph, served.block)(QUESTION)
        together.result()


def test_a_run_leaves_its_answer_its_ledger_and_its_timeline() -> None:
    graph = _panel(2)
    with _serving(graph) as served:
        state = moa_flow(graph, served.block)(QUESTION, return_state=True)
    found = _artifacts(state)
    assert found["panel-answer"].data == state.result() and found["panel-answer"].type == "markdown"
    ledger = json.loads(found["panel-ledger"].data)
    assert [(row["call"], row["agent"], row["engine"], row["state"]) for row in ledger] == [
        ("1/a1", "a1", "script", "finished"),
        ("1/a2", "a2", "script", "finished"),
        ("answer", "chief", "script", "finished"),
    ]
    assert sum(row["completion_tokens"] for row in ledger) == served.engine.decoded
    bars = [line.split()[0] for line in found["panel-timeline"].data.splitlines() if line.endswith(" s")]
    assert bars == ["1/a1", "1/a2", "answer"]


def _failing(*faults: Mapping[str, Any], policy: Mapping[str, Any], **agents: Any) -> Graph:
    script = {"kind": "scripted", "model": "script", "faults": list(faults)}
    return _panel(3, spec={"engines": {"script": script}, "policy": policy}, agents=agents)


def test_an_answer_is_made_of_what_a_quorum_leaves() -> None:
    graph = _failing({"agent": "a2", "kind": "refused"}, policy={"quorum": 2})
    with _serving(graph) as whole, Client(whole.url) as client:
        expected = client.run(QUESTION).text
    with _serving(graph) as served:
        state = moa_flow(graph, served.block)(QUESTION, return_state=True)
        runs = _runs(state, 4)
    assert state.result() == expected
    names = {"1/a1": "Completed", "1/a2": "Failed", "1/a3": "Completed", "answer": "Completed"}
    assert {name: run.state_name for name, run in runs.items()} == names
    found = _artifacts(state)
    (failed,) = [row for row in json.loads(found["panel-ledger"].data) if row["state"] == "failed"]
    assert failed["call"] == "1/a2" and "script" in failed["error"]
    assert "×" in found["panel-timeline"].data.splitlines()[2]


def test_too_few_proposals_fail_the_flow_with_their_reasons() -> None:
    refused = [{"agent": agent, "kind": "refused"} for agent in ("a2", "a3")]
    graph = _failing(*refused, policy={"quorum": 2})
    with _serving(graph) as served:
        state = moa_flow(graph, served.block)(QUESTION, return_state=True)
    assert sorted(served.asked()) == ["a1", "a2", "a3"]
    with pytest.raises(QuorumNotMet, match=r"answer sees 1 of 3 proposals.*1/a2: .*1/a3: "):
        state.result()
    assert _artifacts(state).keys() == {"panel-ledger", "panel-timeline"}


def test_a_required_proposal_is_missed_whatever_the_quorum() -> None:
    graph = _failing({"agent": "a2", "kind": "refused"}, policy={"quorum": 1}, a2={"required": True})
    with _serving(graph) as served, pytest.raises(QuorumNotMet, match="1/a2"):
        moa_flow(graph, served.block)(QUESTION)


def test_a_call_is_tried_again_by_prefect_alone_and_only_where_it_may_help() -> None:
    faults = {"agent": "a1", "times": 1}, {"agent": "a2"}, {"agent": "a3", "kind": "refused"}
    graph = _failing(*faults, policy={"retries": 2})
    with _serving(graph) as served:
        state = moa_flow(graph, served.block)(QUESTION, return_state=True)
        runs = _runs(state, 4)
    assert {agent: served.asked().count(agent) for agent in ("a1", "a2", "a3")} == {"a1": 2, "a2": 3, "a3": 1}
    assert {name: run.run_count for name, run in runs.items() if run.run_count > 1} == {"1/a1": 2, "1/a2": 3}
    assert runs["1/a2"].state_name == "Failed" and state.is_completed()


def test_a_call_that_prefect_gives_up_is_given_up_by_its_engine() -> None:
    graph = _failing({"agent": "a1", "kind": "hang"}, policy={})
    with _serving(graph, ServerSettings(silence_s=0.5)) as served:
        brief = ask.with_options(timeout_seconds=0.5)
        state = asyncio.run(brief(served.block, "panel", "1/a1", QUESTION, {}, return_state=True))
        assert state.name == "TimedOut" and served.asked() == ["a1"]
        until(lambda: not served.engine.active, within_s=30)


def test_a_call_has_the_time_that_the_graph_gives_it() -> None:
    graph = _failing({"agent": "a1", "kind": "hang"}, policy={"retries": 0}, a1={"timeout_s": 1.0})
    with _serving(graph) as served:
        state = moa_flow(graph, served.block)(QUESTION, return_state=True)
        runs = _runs(state, 4)
    assert runs["1/a1"].state.is_failed() and runs["answer"].state_name == "Completed"


def test_a_flow_that_was_killed_goes_on_without_asking_again_whom_it_has(storage: Path, tmp_path: Path) -> None:
    hangs = {"agent": "a2", "first": 2, "times": 1, "kind": "hang"}
    script = {"kind": "scripted", "model": "script"}
    plain = _panel(2, 2, spec={"engines": {"script": script}})
    with _serving(plain) as whole, Client(whole.url) as client:
        expected = client.run(QUESTION).text
    graph = _panel(2, 2, spec={"engines": {"script": {**script, "faults": [hangs]}}})
    with _serving(graph) as served:
        command, env = _written(graph, served.url, tmp_path), _environment(tmp_path)
        with (
            (tmp_path / "first.log").open("w") as log,
            subprocess.Popen(command, env=env, cwd=tmp_path, stdout=log, stderr=log) as first,
        ):
            try:
                until(lambda: len(served.asked()) == 4 and _kept(storage) == 3, within_s=120)
                assert first.poll() is None and sorted(served.asked()) == ["a1", "a1", "a2", "a2"]
            finally:
                first.kill()
        until(lambda: not served.engine.active, within_s=30)
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected.strip()
    assert served.asked()[4:] == ["a2", "chief"]


def _kept(storage: Path) -> int:
    return len([path for path in storage.rglob("*") if path.is_file()]) if storage.exists() else 0


def test_the_same_question_is_answered_from_what_is_kept_whoever_serves_until_the_graph_changes() -> None:
    graph, changed = _panel(2), _panel(2, agents={"a1": {"system": "Be brief."}})
    with _serving(graph) as served:
        first = moa_flow(graph, served.block)(QUESTION)
    with _serving(graph) as other:
        state = moa_flow(graph, other.block)(QUESTION, return_state=True)
        assert state.result() == first and not other.asked()
        assert {row["state"] for row in json.loads(_artifacts(state)["panel-ledger"].data)} == {"kept"}
        with temporary_settings(updates={PREFECT_TASKS_REFRESH_CACHE: True}):
            moa_flow(graph, other.block)(QUESTION)
        assert sorted(other.asked()) == ["a1", "a2", "chief"]
    with _serving(graph) as other:
        moa_flow(graph, other.block)("And why?")
        assert sorted(other.asked()) == ["a1", "a2", "chief"]
    with _serving(changed) as other:
        moa_flow(changed, other.block)(QUESTION)
        assert len(other.asked()) == 3


def test_a_server_is_a_block_whose_key_nobody_reads() -> None:
    with _serving(_panel(2), ServerSettings(api_keys=("sesame",))) as served:
        MoAServer(url=served.url, api_key="sesame").save("lab")
        block = MoAServer.load("lab")
        assert "sesame" not in repr(block)
        assert moa_flow(served.graph, block)(QUESTION)
        with pytest.raises(MoARayError, match="key"):
            moa_flow(served.graph, served.block)("Without one?")


def test_without_a_key_of_its_own_a_block_takes_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_RAY_API_KEY", "sesame")
    with _serving(_panel(2), ServerSettings(api_keys=("sesame",))) as served:
        assert moa_flow(served.graph, served.block)(QUESTION)


def test_the_snippet_of_the_docs_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (yaml,) = snippets(ROOT / "docs" / "integrations" / "prefect.md", "yaml")
    (python,) = snippets(ROOT / "docs" / "integrations" / "prefect.md", "python")
    (tmp_path / "panel.yaml").write_text(yaml)
    monkeypatch.chdir(tmp_path)
    with _serving(loads(yaml)) as served:
        names: dict[str, Any] = {}
        exec(compile(python.replace("http://127.0.0.1:8000/v1", served.url), "prefect.md", "exec"), names)
        assert "chief" in names["answer"] and len(served.asked()) == 3
