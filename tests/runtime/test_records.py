from __future__ import annotations

import json
import sqlite3
import stat
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.engines import Usage
from moa_ray.errors import MoARayError, RequestError
from moa_ray.graph import Message, conversation
from moa_ray.runtime import (
    AnswerDelta,
    Event,
    GateDecided,
    RunFinished,
    RunOptions,
    RunStarted,
    from_json,
    to_json,
)
from moa_ray.runtime.records import VARIABLE, Recorder, Records, Retention, default_path
from tests.conftest import until
from tests.runtime.panels import panel

WHY = conversation("Why is the sky blue?")


async def events_of(*layers: int, **options: Any) -> list[Event]:
    run, _ = panel(*layers, **options)
    seen: list[Event] = []
    try:
        async for event in run.stream(WHY, RunOptions(draft_flush_s=0)):
            seen.append(event)
    except MoARayError:
        pass
    return seen


def simple(run: str = "run-1", text: str = "blue") -> list[Event]:
    usage = Usage(prompt_tokens=3, completion_tokens=2)
    return [
        RunStarted(run, 0.0, "g", 1),
        AnswerDelta(run, 0.5, text),
        RunFinished(run, 1.0, text, usage, 0.5, "answer"),
    ]


def write(path: Path, *runs: list[Event], asked: list[Message] = WHY, **retention: Any) -> Recorder:
    recorder = Recorder(path, Retention(**retention))
    for events in runs:
        record = recorder.run(asked)
        for event in events:
            record.add(event)
        record.close()
    recorder.close()
    return recorder


@pytest.mark.parametrize("policy", [{}, {"streaming": "staircase"}, {"streaming": "overlap"}])
async def test_a_recorded_run_is_read_as_it_went(tmp_path: Path, policy: dict[str, str]) -> None:
    events = await events_of(2, 2, spec={"policy": policy}, reply_tokens=30, itl_s=0.001)
    write(tmp_path / "runs.sqlite", events)
    row, read = Records(tmp_path / "runs.sqlite").find("last")
    assert [to_json(event) for event in read] == [to_json(event) for event in events]
    assert [type(event) for event in read] == [type(event) for event in events]
    end = events[-1]
    assert isinstance(end, RunFinished)
    assert (row.run, row.graph, row.state, row.asked) == (end.run, "panel", "finished", tuple(WHY))
    assert (row.prompt_tokens, row.completion_tokens) == (end.usage.prompt_tokens, end.usage.completion_tokens)


@given(st.dictionaries(st.text(), st.floats(allow_nan=False)), st.lists(st.lists(st.text(min_size=1))))
def test_an_event_comes_back_from_its_json(weights: dict[str, float], layers: list[list[str]]) -> None:
    event = GateDecided("r", 0.25, "random", weights, tuple(map(tuple, layers)), 3, 0.5)
    again = from_json(json.loads(json.dumps(to_json(event))))
    assert isinstance(again, GateDecided) and again.layers == event.layers and to_json(again) == to_json(event)


def test_what_is_no_event_is_told() -> None:
    with pytest.raises(ValueError, match=r"there is no event 'run\.flown'"):
        from_json({"event": "run.flown"})
    with pytest.raises(ValueError, match=r"run\.started: .*'graph'"):
        from_json({"event": "run.started", "run": "r", "t": 0.0, "calls": 1})
    assert from_json({**to_json(simple()[0]), "of_a_later_version": 1}) == simple()[0]


def test_of_a_run_that_its_caller_left_there_is_what_it_did_until_then(tmp_path: Path) -> None:
    write(tmp_path / "r", simple()[:-1])
    row, events = Records(tmp_path / "r").find("run-1")
    assert row.state == "left" and events == tuple(simple()[:-1])


async def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    write(tmp_path / "r", await events_of(1, faults=[{}], spec={"policy": {"retries": 0}}))
    (row,) = Records(tmp_path / "r").latest(5)
    assert row.state == "failed" and row.error.partition(":")[0]


def test_without_texts_nothing_of_what_was_said_is_in_the_file(tmp_path: Path) -> None:
    calls = ({"index": 0, "function": {"name": "f", "arguments": '{"secret": 1}'}},)
    events = [*simple(text="a secret")[:2], AnswerDelta("run-1", 0.6, "", calls), simple(text="a secret")[2]]
    write(tmp_path / "r", events, asked=conversation("my secret"), texts=False)
    assert b"secret" not in (tmp_path / "r").read_bytes()
    row, told = Records(tmp_path / "r").find("last")
    assert row.asked[0]["content"] == "[9 characters]"
    assert isinstance(told[-1], RunFinished) and told[-1].text == "[8 characters]"


def test_the_oldest_of_too_many_and_the_too_old_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "r"
    write(path, *(simple(f"run-{n}") for n in range(150)))
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE runs SET began = ? WHERE run = 'run-149'", (time.time() - 40 * 86_400,))
    write(path, simple("new"), runs=50)
    rows = Records(path).latest(1000)
    assert len(rows) == 50 and rows[-1].run == "new" and "run-149" not in {row.run for row in rows}


def test_the_file_is_for_its_user_alone(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "r", simple())
    assert stat.S_IMODE((tmp_path / "folder" / "r").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700


def test_a_disk_that_is_full_loses_runs_and_says_how_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = tmp_path / "r"
    full.symlink_to("/dev/full")
    assert write(full, simple("a"), simple("b")).lost == 2
    (told,) = (record.message for record in caplog.records if "not recorded" in record.message)
    assert str(full) in told


def test_a_locked_file_makes_nobody_wait_and_later_runs_are_recorded(tmp_path: Path) -> None:
    path = tmp_path / "r"
    write(path, simple("before"))
    recorder = Recorder(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        record = recorder.run(WHY)
        began = time.perf_counter()
        for event in simple("locked"):
            record.add(event)
        assert time.perf_counter() - began < 0.5  # a lock is waited for a whole second, by the thread
        until(lambda: recorder.lost == 1)
        other.execute("ROLLBACK")
    record = recorder.run(WHY)
    for event in simple("after"):
        record.add(event)
    recorder.close()
    assert [row.run for row in Records(path).latest(9)] == ["before", "after"]


def test_several_recorders_write_to_one_file(tmp_path: Path) -> None:
    recorders = [Recorder(tmp_path / "r") for _ in range(4)]
    for n in range(40):
        record = recorders[n % 4].run(WHY)
        for event in simple(f"run-{n}"):
            record.add(event)
    for recorder in recorders:
        recorder.close()
    assert len(Records(tmp_path / "r").latest(99)) == 40 and not any(recorder.lost for recorder in recorders)


def test_a_run_is_found_by_how_its_id_begins(tmp_path: Path) -> None:
    write(tmp_path / "r", simple("run-aa"), simple("run-ab"), simple("run-b"), simple("run-bc"))
    records = Records(tmp_path / "r")
    assert records.find("run-aa")[0].run == "run-aa" and records.find("run-b")[0].run == "run-b"
    with pytest.raises(RequestError, match="several runs begin with 'run-a'"):
        records.find("run-a")
    with pytest.raises(RequestError, match="there is no run 'x'"):
        records.find("x")
    assert list(records.lines(["run-b"])) == [json.dumps(to_json(event)) for event in simple("run-b")]


def test_a_file_that_holds_no_records_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no run was recorded"):
        Records(tmp_path / "none")
    (tmp_path / "text").write_text("not SQLite at all, but long enough to be looked at as a header of a file")
    with pytest.raises(RequestError, match="cannot be read as records"):
        Records(tmp_path / "text").latest(1)


def test_where_records_are_is_said_by_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_path() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "r"))
    assert default_path() == tmp_path / "r"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "moa-ray" / "runs.sqlite"
