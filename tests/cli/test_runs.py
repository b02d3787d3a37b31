from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from moa_ray.graph import conversation
from moa_ray.runtime import to_json
from moa_ray.runtime.records import Recorder
from tests.commands import ROOT, moa_ray
from tests.runtime.panels import panel
from tests.test_docs import commands


@pytest.fixture
async def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records of one run; its events in JSON."""
    path, asked = tmp_path / "runs.sqlite", conversation("Why is the sky blue?")
    run, _ = panel(2, reply="{agent} says so.", itl_s=0.1)
    recorder = Recorder(path)
    record, lines = recorder.run(asked), []
    async for event in run.stream(asked):
        record.add(event)
        lines.append(json.dumps(to_json(event)))
    recorder.close()
    monkeypatch.setenv("MOA_RAY_RECORDS", str(path))
    return lines


def test_list_shows_the_latest_runs(recorded: list[str]) -> None:
    done = moa_ray("runs", "list")
    header, row = done.stdout.splitlines()
    assert header.split()[:4] == ["run", "graph", "when", "state"]
    assert "panel" in row and "finished" in row and row.rstrip().endswith("Why is the sky blue?")
    (told,) = (json.loads(line) for line in moa_ray("runs", "list", "--json").stdout.splitlines())
    assert told["graph"] == "panel" and told["asked"][0]["content"] == "Why is the sky blue?"
    assert moa_ray("runs", "list", "--graph", "other", "--json").stdout == ""


def test_show_has_the_question_the_answer_and_what_it_took(recorded: list[str]) -> None:
    done = moa_ray("runs", "show", "last", "--timeline")
    assert "chief says so." in done.stdout and "decode" in done.stdout
    assert "Why is the sky blue?" in done.stderr and "1/a2" in done.stderr


def test_replay_takes_the_time_that_the_run_took_or_a_part_of_it(recorded: list[str]) -> None:
    took = json.loads(recorded[-1])["t"]
    began = time.perf_counter()
    done = moa_ray("runs", "replay", "last")
    assert done.stdout == "chief says so.\n" and time.perf_counter() - began > took
    assert moa_ray("runs", "replay", "last", "--speed", "100").stdout == "chief says so.\n"


def test_export_is_the_public_stream_of_events(recorded: list[str]) -> None:
    assert moa_ray("runs", "export").stdout.splitlines() == recorded
    assert moa_ray("runs", "export", json.loads(recorded[0])["run"]).stdout.splitlines() == recorded


def test_the_commands_of_the_docs_run(recorded: list[str]) -> None:
    found = commands(ROOT / "docs" / "observability.md")
    assert [words[:2] for words in found] == [["runs", name] for name in ("list", "show", "replay", "export")]
    for words in found:
        assert moa_ray(*words).stdout.strip()


def test_what_is_not_there_is_told(recorded: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = moa_ray("runs", "show", "nothing")
    assert done.returncode == 2 and "there is no run 'nothing'" in done.stderr
    done = moa_ray("runs", "list", "--file", str(tmp_path / "none"))
    assert done.returncode == 2 and "no run was recorded" in done.stderr
    monkeypatch.setenv("MOA_RAY_RECORDS", "off")
    assert "runs are not recorded" in moa_ray("runs", "list").stderr
