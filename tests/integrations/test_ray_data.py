"""Graphs over data sets of a real Ray Data, against a server of scripted engines."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.commands import ROOT
from tests.conftest import until
from tests.http import free_port
from tests.server.local import Served, serving
from tests.test_docs import snippets

pytest.importorskip("pyarrow")

import ray.data

from moa_ray.client import Client
from moa_ray.errors import SpecError
from moa_ray.integrations.ray_data import MoAProcessor

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]
ONE = ray.data.ActorPoolStrategy(size=1)


def _answered(dataset: Any, url: str, *, batch_size: int = 4, **settings: Any) -> list[dict[str, Any]]:
    kwargs = {"server": f"{url}/v1", "model": "panel", **settings}
    mapped = dataset.map_batches(MoAProcessor, fn_constructor_kwargs=kwargs, batch_size=batch_size, compute=ONE)
    return sorted(mapped.take_all(), key=lambda row: row["n"])


def _questions(served: Served) -> Counter[str]:
    """How often each question was put to the first agent."""
    return Counter(call.messages[-1]["content"] for call in served.engine.calls if call.agent == "a1")


def test_every_row_gets_the_answer_of_a_whole_run_and_keeps_what_it_had() -> None:
    with serving(2) as served:
        rows = _answered(ray.data.from_items([{"n": n, "prompt": f"q{n}?"} for n in range(6)]), served.url)
        with Client(f"{served.url}/v1") as client:
            expected = [client.run(f"q{n}?") for n in range(6)]
    assert [(row["n"], row["moa_text"], row["moa_error"]) for row in rows] == [
        (n, answer.text, "") for n, answer in enumerate(expected)
    ]
    assert {row["moa_completion_tokens"] for row in rows} == {answer.usage.completion_tokens for answer in expected}


def test_a_conversation_is_asked_as_it_stands() -> None:
    conversations = [
        [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}, {"role": "user", "content": "?"}],
        [{"role": "user", "content": "me", "name": "ann"}],
    ]
    with serving(1) as served:
        data = ray.data.from_items([{"n": n, "messages": each} for n, each in enumerate(conversations)])
        rows = _answered(data, served.url, k=1)
        asked = [[dict(m) for m in call.messages] for call in served.engine.calls if call.agent == "a1"]
    assert [row["moa_error"] for row in rows] == ["", ""]
    assert sorted(map(len, asked)) == [1, 3]
    assert conversations[0] in asked


def test_a_row_that_fails_has_its_error_and_the_others_their_answers() -> None:
    prompts = ["fine", "", "also fine", None]
    fault = {"kind": "refused", "agent": "chief", "first": 2, "times": 1}
    with serving(1, spec={"policy": {"retries": 0}}, faults=[fault]) as served:
        data = ray.data.from_items([{"n": n, "prompt": prompt} for n, prompt in enumerate(prompts)])
        rows = _answered(data, served.url, requests=1)
    assert [row["moa_error"].split(":")[0] for row in rows] == [
        "",
        "invalid_request",
        "engine_refused",
        "invalid_request",
    ]
    assert [bool(row["moa_text"]) for row in rows] == [True, False, False, False]


def test_a_server_that_is_away_is_an_error_of_every_row() -> None:
    data = ray.data.from_items([{"n": n, "prompt": "why?"} for n in range(2)])
    rows = _answered(data, f"http://127.0.0.1:{free_port()}")
    assert [row["moa_error"].split(":")[0] for row in rows] == ["server_unreachable"] * 2


def test_no_more_requests_are_in_flight_than_an_actor_may_have() -> None:
    with serving(1, ttft_s=0.05) as served:
        now = most = 0
        stream = served.backend.stream

        async def counted(*arguments: Any) -> AsyncGenerator[Any, None]:
            nonlocal now, most
            now += 1
            most = max(most, now)
            try:
                async with aclosing(stream(*arguments)) as batches:
                    async for batch in batches:
                        yield batch
            finally:
                now -= 1

        served.backend.stream = counted  # type: ignore[method-assign,assignment]
        data = ray.data.from_items([{"n": n, "prompt": f"q{n}?"} for n in range(30)], override_num_blocks=2)
        rows = _answered(data, served.url, requests=3)
    assert (len(rows), most) == (30, 3)


def test_rows_come_while_others_are_still_to_be_asked() -> None:
    with serving(1, ttft_s=0.02) as served:
        data = ray.data.from_items([{"n": n, "prompt": f"q{n}?"} for n in range(120)], override_num_blocks=30)
        kwargs = {"server": f"{served.url}/v1", "model": "panel", "requests": 1}
        mapped = data.map_batches(MoAProcessor, fn_constructor_kwargs=kwargs, batch_size=4, compute=ONE)
        first = next(iter(mapped.iter_rows()))
        asked = len(served.engine.calls)
    assert first["moa_text"] and asked < 2 * 120


def test_a_second_pipeline_takes_the_answers_that_are_there_and_asks_what_failed(tmp_path: Path) -> None:
    data = ray.data.from_items([{"n": n, "prompt": f"q{n}?"} for n in range(6)])
    fault = {"kind": "refused", "agent": "chief", "times": 2}
    with serving(1, spec={"policy": {"retries": 0}}, faults=[fault]) as served:
        first = _answered(data, served.url, answers=str(tmp_path))
        assert sum(bool(row["moa_error"]) for row in first) == 2
        second = _answered(data, served.url, answers=str(tmp_path))
        assert len(served.engine.calls) == 2 * (6 + 2)
        assert not any(row["moa_error"] for row in second)
        assert _answered(data, served.url, answers=str(tmp_path)) == second
        assert len(served.engine.calls) == 2 * (6 + 2)
        _answered(data, served.url, answers=str(tmp_path), temperature=0.5)  # other questions
        assert len(served.engine.calls) == 2 * (6 + 2 + 6)


def test_rows_that_ask_the_same_are_asked_each_where_they_have_an_id(tmp_path: Path) -> None:
    with serving(1) as served:
        data = ray.data.from_items([{"n": n, "id": n, "prompt": "why?"} for n in range(3)])
        _answered(data, served.url, answers=str(tmp_path))
        _answered(data, served.url, answers=str(tmp_path))
        assert len(served.engine.calls) == 2 * 3


PIPELINE = """
import json, sys
import ray
from moa_ray.integrations.ray_data import MoAProcessor
url, answers = sys.argv[1:]
ray.init(address="local", num_cpus=2, include_dashboard=False)
data = ray.data.from_items([{"prompt": f"q{n}?"} for n in range(40)], override_num_blocks=4)
kwargs = {"server": url + "/v1", "model": "panel", "answers": answers, "requests": 2}
two = ray.data.ActorPoolStrategy(size=2)
done = data.map_batches(MoAProcessor, fn_constructor_kwargs=kwargs, batch_size=5, compute=two, num_cpus=0.5)
print(json.dumps([[row["prompt"], row["moa_text"], row["moa_error"]] for row in done.take_all()]))
"""


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Any]:
    """Starts a pipeline in a process of its own."""
    running: list[subprocess.Popen[str]] = []

    def start(url: str, answers: Path) -> subprocess.Popen[str]:
        (tmp_path / "pipeline.py").write_text(PIPELINE)
        command = [sys.executable, str(tmp_path / "pipeline.py"), url, str(answers)]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
            "PYTHONPATH": str(ROOT)
        }
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """End it and the Ray that it started, at once and for good; some of Ray's own would stay."""
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everybody:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    assert not psutil.wait_procs(everybody, timeout=30)[1]
    process.wait(10)


def _kept(folder: Path) -> list[str]:
    """The questions whose answers are kept whole."""
    text = b"".join(path.read_bytes() for path in folder.glob("*.jsonl")).decode(errors="replace")
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line)["text"].split()[2] for line in whole]


def test_a_killed_pipeline_started_again_asks_for_no_answer_twice(pipeline: Any, tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    with serving(1, ttft_s=0.1) as served:
        killed = pipeline(served.url, answers)
        until(lambda: len(_kept(answers)) >= 7)
        _kill(killed)
        served.until_idle()
        kept, before = set(_kept(answers)), _questions(served)
        assert 7 <= len(kept) < 40
        out, _ = pipeline(served.url, answers).communicate(timeout=120)
        again = _questions(served) - before
    rows = json.loads(out.splitlines()[-1])
    assert {prompt for prompt, _, _ in rows} == {f"q{n}?" for n in range(40)} and len(rows) == 40
    assert all(not error and text.startswith(f"chief answers: {prompt}") for prompt, text, error in rows)
    assert set(again) == {f"q{n}?" for n in range(40)} - kept
    assert set(again.values()) == {1}


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"name": "ann"}\n')
    with serving(1) as served:
        processor = MoAProcessor(f"{served.url}/v1", "panel", answers=str(tmp_path))
        with pytest.raises(SpecError, match=r"other\.jsonl: these are no answers"):
            _once(processor, {"prompt": ["why?"]})
        assert not served.engine.calls


@pytest.mark.parametrize("content", [b"bytes", float("nan"), "half a \ud83d pair"])
def test_what_json_does_not_know_is_an_error_of_its_row(content: Any) -> None:
    with serving(1) as served:
        done = _once(
            MoAProcessor(f"{served.url}/v1", "panel"),
            {"messages": [[{"role": "user", "content": each}] for each in (content, "why?")]},
        )
    assert [error[:38] for error in done["moa_error"]] == ["invalid_request: a row asks in what JS", ""]


def test_half_a_line_of_one_who_was_killed_is_an_answer_that_is_missing(tmp_path: Path) -> None:
    with serving(1) as served:
        _once(MoAProcessor(f"{served.url}/v1", "panel", answers=str(tmp_path)), {"prompt": ["a", "b"]})
        (path,) = tmp_path.glob("*.jsonl")
        path.write_bytes(path.read_bytes()[:-9])
        again = MoAProcessor(f"{served.url}/v1", "panel", answers=str(tmp_path))
        assert _once(again, {"prompt": ["a", "b"]})["moa_error"] == ["", ""]
        assert len(served.engine.calls) == 2 * 3


def _once(processor: MoAProcessor, batch: dict[str, Any]) -> dict[str, Any]:
    return asyncio.run(processor(batch))


def test_the_snippet_of_the_docs_runs(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"prompt": "why?"}\n{"prompt": ""}\n')
    (text,) = snippets(ROOT / "docs" / "integrations" / "ray-data.md", "python")
    with serving(1) as served:
        text = text.replace("http://127.0.0.1:8000", served.url)
        for name in ("questions.jsonl", "/shared/answers", "answered"):
            text = text.replace(f'"{name}"', repr(str(tmp_path / name.removeprefix("/shared/"))))
        exec(compile(text, "ray-data.md", "exec"), {})
    rows = [json.loads(line) for path in (tmp_path / "answered").iterdir() for line in path.read_text().splitlines()]
    assert sorted(bool(row["moa_error"]) for row in rows) == [False, True]
