"""The plug-in in all of Airflow: API server, DAG processor, scheduler and triggerer, a process each."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator

import pytest

from moa_ray.integrations.airflow import source
from tests.conftest import until
from tests.integrations.airflows import Airflow, Served, graph, serving

if importlib.util.find_spec("airflow") is None:
    pytest.skip("Airflow is not installed here", allow_module_level=True)

QUESTION = "Why {{ 1 + 1 }}?"
_SETTLED_S = 10.0
"""Agents take longer than the scheduler takes to see that a task was deferred: of one that is back before that it
believes that it was lost, and starts it again (apache/airflow#71580, #72716)."""

_SLOW = """
from datetime import timedelta

from airflow.sdk import DAG

from moa_ray.integrations.airflow import MoAOperator

with DAG("slow", schedule=None):
    MoAOperator(task_id="ask", question="why?", model="slow", server={server!r},
                execution_timeout=timedelta(seconds=30))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Airflow, Served]]:
    """A running Airflow with the exported files of some graphs, and the server that these name."""
    graphs = (
        graph("exported", ttft_s=_SETTLED_S),
        graph("killed", {"kind": "hang", "agent": "b", "first": 2, "times": 1}, ttft_s=_SETTLED_S),
        graph("cleared", {"kind": "refused", "agent": "chief", "times": 1, "after_tokens": 1}, ttft_s=_SETTLED_S),
        graph("slow", {"kind": "hang", "agent": "b"}),
    )
    airflow = Airflow(tmp_path_factory.mktemp("whole") / "home")
    with serving(*graphs) as served:
        for each in graphs:
            (airflow.dags / f"{each.spec.name}.py").write_text(source(each, served.url))
        (airflow.dags / "slow.py").write_text(_SLOW.format(server=served.url))
        airflow.command("db", "migrate")
        try:
            airflow.start("api-server")
            airflow.start("dag-processor")
            airflow.start("scheduler", "--skip-serve-logs")
            airflow.start("triggerer", "--skip-serve-logs")
            until(lambda: len(airflow.dag_ids()) == len(graphs), within_s=120)
            yield airflow, served
        finally:
            airflow.close()


@pytest.mark.timeout(900)
def test_the_exported_file_runs_in_the_dags_folder(whole: tuple[Airflow, Served]) -> None:
    airflow, served = whole
    assert airflow.get("/importErrors")["total_entries"] == 0
    done = airflow.trigger("exported", QUESTION)
    assert airflow.ended(done) == "success"
    assert served.asked("exported") == ["a", "a", "b", "b", "c", "chief"]
    assert airflow.result(done, "answer") == served.whole("exported", QUESTION)


@pytest.mark.timeout(900)
def test_a_call_that_is_cut_off_with_its_triggerer_is_made_again_and_no_other(whole: tuple[Airflow, Served]) -> None:
    airflow, served = whole
    engine = served.engines["killed"]
    done = airflow.trigger("killed", QUESTION)
    until(lambda: airflow.tasks(done, "state").get("2/c") == "success" and engine.active == 1, within_s=120)
    assert served.asked("killed") == ["a", "a", "b", "b", "c"]
    airflow.kill("triggerer", signal.SIGKILL)
    until(lambda: engine.active == 0, within_s=120)
    airflow.start("triggerer", "--skip-serve-logs")
    assert airflow.ended(done) == "success"
    assert served.asked("killed") == ["a", "a", "b", "b", "b", "c", "chief"]
    assert set(airflow.tasks(done, "try_number").values()) == {1}
    assert airflow.result(done, "answer") == served.whole("killed", QUESTION)


@pytest.mark.timeout(900)
def test_a_failed_task_that_is_cleared_asks_for_itself_alone(whole: tuple[Airflow, Served]) -> None:
    airflow, served = whole
    done = airflow.trigger("cleared", QUESTION)
    assert airflow.ended(done) == "failed"
    assert served.asked("cleared") == ["a", "a", "b", "b", "c", "chief"]
    body = {"dry_run": False, "only_failed": True, "dag_run_id": done.rpartition("/")[2]}
    airflow.post("/dags/cleared/clearTaskInstances", body)
    assert airflow.ended(done) == "success"
    assert served.asked("cleared") == ["a", "a", "b", "b", "c", "chief", "chief"]
    assert airflow.tasks(done, "try_number")["answer"] == 2


def test_waiting_agents_hold_no_worker_slot_and_a_time_out_stops_them(whole: tuple[Airflow, Served]) -> None:
    airflow, served = whole
    hanging = airflow.trigger("slow", QUESTION)
    until(lambda: served.engines["slow"].active > 0, within_s=120)
    assert airflow.get(f"{hanging}/taskInstances/ask")["state"] == "deferred"
    assert airflow.ended(hanging) == "failed"
    until(lambda: served.engines["slow"].active == 0, within_s=120)


def test_the_command_line_lists_the_provider(whole: tuple[Airflow, Served]) -> None:
    listed = json.loads(whole[0].command("providers", "list", "--output", "json"))
    assert "moa-ray" in [row["package_name"] for row in listed]
