from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.commands import COMMAND, environment, moa_ray
from tests.engines.test_registry import SPEC

pytestmark = pytest.mark.xdist_group("ray")  # one cluster at a time is enough for the machine


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "g.yaml"
    path.write_text(SPEC.replace("model: m", 'model: m, reply: "{agent} says so."'))
    return path


def test_run_puts_the_answer_on_stdout_and_the_table_on_stderr(spec: Path) -> None:
    done = moa_ray("run", str(spec), "why?")
    assert (done.returncode, done.stdout) == (0, "chief says so.\n")
    header, proposer, answer, total = done.stderr.splitlines()
    assert header.split() == ["agent", "engine", "state", "prompt", "cached", "tokens", "TTFT", "s", "total", "s"]
    assert proposer.split()[:4] == ["1/a", "s", "✓", "finished"]
    assert answer.split()[0] == "answer" and total.split()[0] == "all"


def test_json_prints_events_and_nothing_else(spec: Path) -> None:
    done = moa_ray("run", str(spec), "why?", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, "")
    assert events[0]["event"] == "run.started" and events[-1]["event"] == "run.finished"
    assert events[-1]["text"] == "chief says so."


def test_a_timeline_is_shown_and_drawn(spec: Path, tmp_path: Path) -> None:
    picture = tmp_path / "run.svg"
    done = moa_ray("run", str(spec), "why?", "--timeline", "--timeline-svg", str(picture))
    assert (done.returncode, done.stdout) == (0, "chief says so.\n")
    assert "first token" in done.stderr and "prefill" in done.stderr
    assert picture.read_text().startswith("<svg")


def test_a_timeline_that_cannot_be_written_is_told_before_anything_starts(spec: Path, tmp_path: Path) -> None:
    done = moa_ray("run", str(spec), "why?", "--timeline-svg", str(tmp_path / "no" / "run.svg"))
    assert done.returncode == 2 and "cannot be written" in done.stderr and done.stdout == ""


def test_a_failed_run_ends_with_its_reason_and_exit_1(spec: Path) -> None:
    spec.write_text(SPEC.replace("model: m", "model: m, faults: [{kind: refused}]"))
    done = moa_ray("run", str(spec), "why?", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["error"] == "QuorumNotMet"
    assert done.stderr.startswith("error: 0 of 1 agents answered, 1 needed: 1/a (EngineRefused: scripted fault")


def test_chat_remembers_and_ends_with_its_input(spec: Path) -> None:
    spec.write_text(SPEC.replace("model: m", 'model: m, replies: {a: x, chief: "call {call}"}'))
    done = moa_ray("chat", str(spec), stdin="first?\n\nsecond?\n")
    assert done.returncode == 0
    assert "call 1" in done.stdout and "call 2" in done.stdout


def test_ctrl_c_leaves_no_process_and_exits_130(spec: Path) -> None:
    spec.write_text(SPEC.replace("model: m", "model: m, itl_s: 0.05, reply_tokens: 10000"))
    command = [*COMMAND, "run", str(spec), "why?", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["event"] == "run.started"
        below = psutil.Process(process.pid).children(recursive=True)
        assert any("EngineReplica" in " ".join(child.cmdline()) or "ray::" in child.name() for child in below)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=30) == 130
        assert "Traceback" not in process.stderr.read()
    _, alive = psutil.wait_procs(below, timeout=15)
    assert not alive
