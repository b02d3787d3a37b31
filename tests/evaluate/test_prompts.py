from __future__ import annotations

from pathlib import Path

import pytest

from moa_ray.errors import RequestError
from moa_ray.evaluate import Objectives
from moa_ray.evaluate.prompts import from_file, made_up


def test_prompts_messages_and_turns_are_asked_and_asked_again_where_there_are_too_few(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = ['{"prompt": "one"}', '{"messages": [{"role": "user", "content": "two"}]}', '{"turns": ["three", "four"]}']
    path.write_text("\n\n".join(lines))
    assert [messages[-1]["content"] for messages in from_file(path, 5)] == ["one", "two", "three", "one", "two"]


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "two"}', encoding="utf-8")
    assert [messages[0]["content"] for messages in from_file(path, 2)] == ["a\u2028b", "two"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "p.jsonl:2: this is no (question|JSON object)"),
        ("[1]", "p.jsonl:2: this is no (question|JSON object)"),
        ('{"turns": "why"}', "p.jsonl:2: this is no (question|JSON object)"),
        (r'{"prompt": "\ud800"}', "p.jsonl:2: this is no (question|JSON object)"),
        ("{}", "p.jsonl:2: the prompt is empty"),
        ('{"prompt": " "}', "p.jsonl:2: the prompt is empty"),
        ('{"messages": [{"role": "clown", "content": "x"}]}', "p.jsonl:2: message 1 has the role 'clown'"),
    ],
)
def test_a_line_that_is_no_prompt_is_told_by_its_number(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\n' + line)
    with pytest.raises(RequestError, match=reason):
        from_file(path, 1)


def test_a_file_that_is_missing_or_empty_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        from_file(tmp_path / "nothing", 1)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(RequestError, match="holds no prompt"):
        from_file(tmp_path / "empty", 1)


def test_made_up_prompts_differ_and_come_again_with_their_seed() -> None:
    prompts = made_up(20, 30, 1)
    assert prompts == made_up(20, 30, 1) != made_up(20, 30, 2)
    assert len({prompt[0]["content"] for prompt in prompts}) == 20
    assert all(len(prompt[0]["content"].split()) == 30 for prompt in prompts)


@pytest.mark.parametrize("text", ["ttf:5", "ttft", "ttft:fast", "ttft:-1", "ttft:nan"])
def test_an_objective_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--goodput"):
        Objectives.of([text])
