"""`moa-ray bench` against a real server of our own, as a user runs it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import COMMAND, ROOT, environment, moa_ray
from tests.server.local import Served, serving
from tests.test_docs import commands


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(2, ttft_s=0.02, reply="one two three") as served:
        yield served


def test_a_load_is_measured_and_told_as_a_table_and_as_json(served: Served, tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    common = (f"{served.url}/v1", "--num-prompts", "12", "--max-concurrency", "4", "--goodput", "e2el:60000")
    done = moa_ray("bench", *common, "-o", str(target))
    assert done.returncode == 0, done.stderr
    assert "panel: 12 answers" in done.stdout and all(name in done.stdout for name in ("TTFT", "TPOT", "ITL", "p99"))
    told = json.loads(target.read_text())
    assert (told["model"], told["completed"], told["failed"], told["total_output_tokens"]) == ("panel", 12, 0, 12 * 9)
    assert told["median_ttft_ms"] >= 40 and told["request_goodput"] == pytest.approx(told["request_throughput"])
    as_json = moa_ray("bench", *common, "--json")
    assert json.loads(as_json.stdout)["completed"] == 12


def test_an_open_loop_asks_an_agent_by_its_name(served: Served) -> None:
    done = moa_ray(
        "bench", f"{served.url}/v1", "--model", "panel/a1", "--num-prompts", "8", "--request-rate", "40", "--json"
    )
    assert json.loads(done.stdout)["completed"] == 8, done.stderr


def test_the_commands_of_the_docs_run(served: Served) -> None:
    found = [words for words in commands(ROOT / "docs" / "evaluation.md") if words[0] == "bench"]
    assert len(found) == 2
    for words in found:
        at_our_server = [word.replace("http://127.0.0.1:8000", served.url) for word in words]
        done = moa_ray(*at_our_server, "--num-prompts", "6")
        assert done.returncode == 0 and "6 answers" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("options", "reason", "code"),
    [
        (("--model", "panl"), "did you mean 'panel'?", 1),
        (("--max-concurrency", "2", "--request-rate", "3"), "an open loop that waits for answers is none", 2),
        (("--goodput", "ttfb:3"), "did you mean 'ttft'?", 2),
        (("--dataset", "nothing.jsonl"), "nothing.jsonl: cannot be read", 2),
        (("-o", "/nowhere/x.json"), "/nowhere/x.json: No such file", 2),
        (("--request-rate", "inf"), "--request-rate", 2),
        (("--timeout", "inf"), "--timeout", 2),
    ],
)
def test_what_makes_no_load_is_told_in_a_line(served: Served, options: tuple[str, ...], reason: str, code: int) -> None:
    done = moa_ray("bench", f"{served.url}/v1", *options)
    assert reason in done.stderr and "Traceback" not in done.stderr and done.returncode == code


def test_an_endpoint_that_is_not_there_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = moa_ray("bench", f"http://127.0.0.1:{port}/v1")
    assert f"cannot reach http://127.0.0.1:{port}/v1" in done.stderr and done.returncode == 1


def test_interrupted_it_tells_what_it_has(served: Served) -> None:
    with serving(2, ttft_s=0.2, reply="one") as slow:
        command = [*COMMAND, "bench", f"{slow.url}/v1", "--num-prompts", "500", "--max-concurrency", "2", "--json"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True
        )
        give_up = time.monotonic() + 60
        while len(slow.engine.calls) < 20 and time.monotonic() < give_up:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
        assert process.returncode == 130, error
        assert 0 < json.loads(out)["completed"] < 500 and "Traceback" not in error
        slow.until_idle()
