"""`moa-ray eval` and `tune` on a real cluster, as a user runs them."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest

from moa_ray.graph import load
from tests.commands import COMMAND, ROOT, environment, moa_ray
from tests.conftest import until
from tests.test_docs import commands

SPEC = """
version: 1
name: panel
engines:
  s: {kind: scripted, model: m, replies: {good: "it is 7", bad: "it is 8", chief: "so 7"}}
agents:
  good: {engine: s, max_tokens: 20}
  bad: {engine: s, max_tokens: 20}
  chief: {engine: s}
layers: [[good, bad]]
aggregator: chief
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "panel.yaml").write_text(SPEC)
    lines = [json.dumps({"question": f"question {n}", "answer": "#### 7"}) for n in range(8)]
    (tmp_path / "questions.jsonl").write_text("\n".join([*lines, "broken"]))
    return tmp_path


@pytest.mark.xdist_group("ray")
def test_an_evaluation_and_a_choice_on_a_cluster_and_again_without_one(ray_cluster: None, files: Path) -> None:
    common = ("--data", str(files / "questions.jsonl"), "--cache", str(files / "cache"))
    page, answers = files / "report.html", files / "answers.jsonl"
    done = moa_ray("eval", str(files / "panel.yaml"), *common, "--html", str(page), "-o", str(answers))
    assert done.returncode == 0, done.stderr
    assert "not worth it, as far as 8 questions can tell: panel" in " ".join(done.stdout.split())
    assert "questions.jsonl:9: this is no JSON object" in done.stdout
    assert "<svg" in page.read_text() and "panel/good" in page.read_text()
    told = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(told) == 4 * 8 and told[0]["answers"] == ["so 7"]

    # All of it comes out of the cache: an address at which nobody is would be an error.
    again = moa_ray("eval", str(files / "panel.yaml"), *common, "--json", "--address", "127.0.0.1:1")
    assert again.returncode == 0, again.stderr
    assert [arm["name"] for arm in json.loads(again.stdout)["arms"]][:3] == ["panel", "panel/good", "panel/bad"]

    chosen = files / "chosen.yaml"
    tuned = moa_ray("tune", str(files / "panel.yaml"), *common, "-o", str(chosen), "--proposers", "2")
    assert tuned.returncode == 0, tuned.stderr
    assert "good alone: no panel within the budget" in " ".join(tuned.stdout.split())
    assert list(load(chosen).spec.agents) == ["good"]


@pytest.mark.xdist_group("ray")
def test_an_evaluation_that_is_interrupted_ends_and_keeps_what_was_answered(ray_cluster: None, files: Path) -> None:
    import ray

    slow = (files / "panel.yaml").read_text().replace("model: m,", "model: m, ttft_s: 0.3,")
    (files / "panel.yaml").write_text(slow)
    words = ["eval", "panel.yaml", "--data", "questions.jsonl", "--cache", "cache", "--concurrency", "1"]
    address = str(ray.get_runtime_context().gcs_address)
    done = files / "cache" / "calls.sqlite"

    def answers() -> int:
        with sqlite3.connect(done) as file:
            return int(file.execute("SELECT count(*) FROM calls").fetchone()[0])

    with subprocess.Popen(
        [*COMMAND, *words, "--address", address], cwd=files, env=environment(), stderr=subprocess.PIPE, text=True
    ) as running:
        until(lambda: done.exists() and answers() > 4, within_s=120)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in told, told
    kept = answers()
    again = moa_ray(*words, "--address", address, "--json", cwd=files)
    assert again.returncode == 0 and answers() > kept, again.stderr


JUDGE = """
version: 1
name: judge
engines: {j: {kind: scripted, model: m, reply: "Both say seven. [[C]]"}}
agents: {judge: {engine: j}}
layers: [[judge]]
aggregator: {vote: {extract: last_line}}
"""


@pytest.mark.xdist_group("ray")
def test_the_commands_of_the_docs_run(ray_cluster: None, files: Path) -> None:
    (files / "judge.yaml").write_text(JUDGE)
    found = [words for words in commands(ROOT / "docs" / "evaluation.md") if words[0] in ("eval", "tune")]
    assert len(found) == 3
    for words in found:
        done = moa_ray(*words, "--cache", str(files / "cache"), "--limit", "4", cwd=files)
        assert done.returncode == 0, done.stderr
    assert "length-controlled" in (files / "report.html").read_text() and load(files / "chosen.yaml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--data", "gone.jsonl"), "gone.jsonl: cannot be read"),
        (("--data", "questions.jsonl", "--scorer", "exakt"), "did you mean 'exact'?"),
        (("--data", "open.jsonl"), "open has no references to score answers by"),
        (("--data", "questions.jsonl", "--endpoint", "nonsense"), "'nonsense' is no endpoint"),
        (("--data", "questions.jsonl", "--address", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_a_line(files: Path, options: tuple[str, ...], said: str) -> None:
    (files / "open.jsonl").write_text('{"prompt": "write a poem"}')
    paths = [str(files / each) if each.endswith(".jsonl") else each for each in options]
    done = moa_ray("eval", str(files / "panel.yaml"), "--cache", str(files / "cache"), *paths)
    assert done.returncode in (1, 2) and said in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr
