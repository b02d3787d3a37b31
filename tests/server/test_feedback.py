"""`/v1/feedback`: what callers say of answers becomes outcomes from which a gate learns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from moa_ray.client import Client, Finished
from moa_ray.errors import RequestError
from moa_ray.gates.feedback import Answered, Feedback, Judgement, Part
from moa_ray.gates.learned import outcomes
from moa_ray.server import ServerSettings
from tests.server.local import Served, serving


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "feedback.jsonl"


@pytest.fixture
def served(file: Path) -> Iterator[Served]:
    with serving(2, settings=ServerSettings(feedback=file), reply="one two") as served:
        yield served


def judge(served: Served, content: str | None = None, **body: Any) -> Any:
    headers = {"content-type": "application/json"}
    return httpx2.post(f"{served.url}/v1/feedback", content=content or json.dumps(body), headers=headers)


def test_a_thumb_is_an_outcome_of_every_agent_that_took_part_and_of_the_panel(served: Served, file: Path) -> None:
    answer = served.ask().json()
    assert judge(served, id=answer["id"], thumb="up").json() == {"id": answer["id"], "object": "feedback"}
    line = json.loads(file.read_text())
    assert line["rewards"] == {"a1": 1.0, "a2": 1.0} and line["panel"] == 1.0
    used = answer["usage"]["total_tokens"]
    assert line["panel_tokens"] == used and 0 < line["tokens"]["a1"] < used
    known = outcomes.load(file, ("a1", "a2"), with_panel=True)
    assert known.questions == ["why?"] and known.rewards.tolist() == [[1.0, 1.0, 1.0]]


def test_streams_responses_and_single_choices_can_be_judged_and_the_last_word_counts(
    served: Served, file: Path
) -> None:
    with Client(f"{served.url}/v1") as client:
        *_, end = client.stream("why?")
        assert isinstance(end, Finished)
        client.feedback(end.answer, 0.25)
        client.feedback(end.answer.id, 0.75)
    response = httpx2.post(f"{served.url}/v1/responses", json={"model": "panel", "input": "how?"}).json()
    assert judge(served, id=response["id"], thumb="down").status_code == 200
    assert judge(served, id=served.ask(n=2).json()["id"], choice=1, reward=1).status_code == 200
    known = outcomes.load(file, ("a1", "a2"))
    assert known.rewards[:, 0].tolist() == [0.75, 0.0, 1.0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"id": "ID", "reward": NaN}', "reward: Input should be"),
        ('{"id": "ID", "reward": 1.5}', "reward: Input should be less than or equal to 1"),
        ('{"id": "ID", "reward": "good"}', "reward: Input should be a valid number"),
        ('{"id": "ID"}', "give a thumb or a reward"),
        ('{"id": "ID", "thumb": "up", "reward": 1}', "give a thumb or a reward"),
        ('{"id": "ID", "thumb": "up", "choice": 1}', "choice: the answer has 1, counted from 0"),
        ('{"id": "chatcmpl-nobody", "thumb": "up"}', "there is no answer 'chatcmpl-nobody' to judge"),
    ],
)
def test_a_judgement_that_is_none_is_refused_and_not_kept(served: Served, file: Path, body: str, reason: str) -> None:
    refused = judge(served, body.replace("ID", served.ask().json()["id"]))
    assert refused.status_code == 400 and reason in refused.json()["error"]["message"]
    assert not file.exists()


def test_an_agent_of_its_own_is_not_judged_and_neither_is_anything_where_nothing_is_kept(served: Served) -> None:
    alone = served.ask(model="panel/a1").json()["id"]
    assert "there is no answer" in judge(served, id=alone, thumb="up").json()["error"]["message"]
    with serving(2) as other:
        refused = judge(other, id=other.ask().json()["id"], thumb="up")
    assert refused.status_code == 400 and "--set feedback=FILE" in refused.json()["error"]["message"]


def test_a_file_that_cannot_be_written_is_an_error_of_the_judgement_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with serving(2, settings=ServerSettings(feedback=tmp_path / "file" / "below")) as served:
        answer = served.ask()
        assert answer.status_code == 200
        refused = judge(served, id=answer.json()["id"], thumb="up")
    assert refused.status_code == 500 and "cannot be kept" in refused.json()["error"]["message"]


def test_the_oldest_answers_are_forgotten(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "f", most=2)
    for number in "123":
        feedback.remember(Answered(number, "panel", ({"role": "user", "content": "why?"},), (Part({"a": 1}, 2),)))
    feedback.judge(Judgement("3", 1.0))
    with pytest.raises(RequestError, match="no answer '1'"):
        feedback.judge(Judgement("1", 1.0))
