from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moa_ray.errors import MoARayError, SpecError
from moa_ray.graph import Message
from moa_ray.runtime import RunResult
from moa_ray.runtime.batch import Tally, batch
from tests.runtime.panels import panel
from tests.runtime.virtual import simulate


class Seen:
    """A watch that remembers."""

    def __init__(self) -> None:
        self.before = Tally()
        self.errors: dict[int, MoARayError] = {}

    def began(self, tally: Tally) -> None:
        self.before = Tally(tally.total, tally.answered, tally.bad, tally.failed)

    def ended(self, tally: Tally, line: int, error: MoARayError | None) -> None:
        if error is not None:
            self.errors[line] = error


def _write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def _records(path: Path) -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["line"] for record in records}) == len(records), "a line was answered twice"
    return {record["line"]: record for record in records}


def _answer(source: Path, target: Path, concurrency: int = 4, **options: Any) -> tuple[Tally, Seen]:
    run, _ = panel(1, reply="{prompt}!", **options)
    seen = Seen()
    return simulate(batch(run.run, source, target, concurrency=concurrency, watch=seen)), seen


def test_every_line_is_answered_and_bad_ones_are_kept_and_told(tmp_path: Path) -> None:
    source = _write(
        tmp_path / "in",
        {"prompt": "one", "id": "a"},
        "not JSON",
        "",
        {"messages": [{"role": "user", "content": "two"}]},
        {"question": "three"},
        {"prompt": ""},
        ["four"],
        {"messages": [{"role": "nobody", "content": "x"}], "id": 7},
    )
    tally, seen = _answer(source, tmp_path / "out")
    assert (tally.total, tally.answered, tally.bad, tally.failed) == (7, 2, 5, 0)
    records = _records(tmp_path / "out")
    assert records[1]["id"] == "a" and records[1]["usage"]["completion_tokens"] > 0
    assert "one" in records[1]["text"] and "two" in records[4]["text"]
    assert {line for line, record in records.items() if "error" in record} == set(seen.errors) == {2, 5, 6, 7, 8}
    assert records[8]["id"] == 7


def test_a_request_that_failed_is_asked_again_by_the_next_batch(tmp_path: Path) -> None:
    source = _write(tmp_path / "in", *({"prompt": f"q{n}"} for n in range(6)))
    tally, seen = _answer(source, tmp_path / "out", 1, faults=[{"agent": "chief", "kind": "refused", "times": 2}])
    assert (tally.answered, tally.failed, set(seen.errors)) == (4, 2, {1, 2})
    tally, seen = _answer(source, tmp_path / "out")
    assert (seen.before.answered, tally.answered, tally.failed) == (4, 6, 0)
    assert set(_records(tmp_path / "out")) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_half_a_line_that_a_crash_left_is_removed_and_its_request_asked_again(tmp_path: Path, cut: int) -> None:
    source, target = _write(tmp_path / "in", *({"prompt": f"q{n}"} for n in range(3))), tmp_path / "out"
    _answer(source, target)
    target.write_bytes(target.read_bytes()[:-cut])
    tally, seen = _answer(source, target)
    assert (seen.before.answered, tally.answered) == (2, 3)
    assert set(_records(target)) == {1, 2, 3}


def test_an_output_of_another_input_is_refused_with_the_line(tmp_path: Path) -> None:
    source, target = _write(tmp_path / "in", {"prompt": "one"}, {"prompt": "two"}), tmp_path / "out"
    _answer(source, target)
    _write(source, {"prompt": "one"}, {"prompt": "other"})
    with pytest.raises(SpecError, match=r"in:2: .*answers another line"):
        _answer(source, target)
    _write(source, {"prompt": "one"})
    with pytest.raises(SpecError, match="answers line 2, which is not there"):
        _answer(source, target)
    with pytest.raises(SpecError, match="not the output of a batch"):
        _answer(source, _write(tmp_path / "other", {"text": "something"}))
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        _answer(tmp_path / "nowhere", target)


def test_no_more_requests_are_in_flight_than_wanted(tmp_path: Path) -> None:
    source = _write(tmp_path / "in", *({"prompt": f"q{n}"} for n in range(20)))
    flying, most = 0, 0
    run, _ = panel(1, ttft_s=0.1)

    async def ask(messages: list[Message]) -> RunResult:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        try:
            return await run.run(messages)
        finally:
            flying -= 1

    simulate(batch(ask, source, tmp_path / "out", concurrency=3, watch=Seen()))
    assert most == 3


_DRIVER = """
import asyncio, sys
from pathlib import Path
from moa_ray.runtime.batch import batch
from tests.runtime.panels import panel
from tests.runtime.test_batch import Seen
run, _ = panel(1, reply="{prompt}!", ttft_s=0.005)
asyncio.run(batch(run.run, Path(sys.argv[1]), Path(sys.argv[2]), concurrency=8, watch=Seen()))
"""


def test_a_driver_that_is_killed_at_any_moment_leaves_every_line_answered_once(tmp_path: Path) -> None:
    count = 400
    source, target = _write(tmp_path / "in", *({"prompt": f"q{n}"} for n in range(1, count + 1))), tmp_path / "out"
    rng, kills, done = random.Random(3), 0, False
    while not done:
        driver = subprocess.Popen([sys.executable, "-c", _DRIVER, str(source), str(target)])
        before = target.stat().st_size if target.exists() else 0
        if kills < 4:
            while driver.poll() is None and (target.stat().st_size if target.exists() else 0) == before:
                time.sleep(0.005)  # it has begun to answer
            time.sleep(rng.uniform(0, 0.15))
            os.kill(driver.pid, signal.SIGKILL)
            kills += 1
        done = driver.wait() == 0
    records = _records(target)
    assert set(records) == set(range(1, count + 1))
    assert all(f"q{line}!" in record["text"] for line, record in records.items())


async def test_a_second_batch_on_one_output_is_refused(tmp_path: Path) -> None:
    source = _write(tmp_path / "in", {"prompt": "q"})
    run, _ = panel(1, ttft_s=0.2)
    first = asyncio.create_task(batch(run.run, source, tmp_path / "out", concurrency=1, watch=Seen()))
    await asyncio.sleep(0.05)
    with pytest.raises(SpecError, match="another batch writes to it"):
        await batch(run.run, source, tmp_path / "out", concurrency=1, watch=Seen())
    await first
