"""What is read as a question, what is left out and told, and what counts as right."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.errors import RequestError
from moa_ray.evaluate import scorers, tasks
from moa_ray.graph import plugins

GSM8K = {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
MT_BENCH = {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Make it rhyme."]}


def written(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_gsm8k_and_mt_bench_are_known_by_their_lines(tmp_path: Path) -> None:
    gsm8k = tasks.load(written(tmp_path / "gsm8k.jsonl", GSM8K, GSM8K))
    assert (gsm8k.name, gsm8k.scorer, len(gsm8k.items)) == ("gsm8k", "number", 2)
    assert gsm8k.items[0].messages == ({"role": "user", "content": "2 + 3?"},)
    bench = tasks.load(written(tmp_path / "bench.jsonl", MT_BENCH))
    assert bench.scorer is None
    assert bench.items == (
        tasks.Item("81", ({"role": "user", "content": "Write a poem."},), ("Make it rhyme.",), (), "writing"),
    )


def test_references_of_any_file_are_compared_exactly_unless_a_scorer_is_named(tmp_path: Path) -> None:
    file = written(
        tmp_path / "mine.jsonl",
        {"id": "a", "prompt": "Capital of France?", "reference": "Paris"},
        {"messages": [{"role": "system", "content": "brief"}, {"role": "user", "content": "1+1"}], "references": [2]},
    )
    task = tasks.load(file)
    assert task.scorer == "exact" and [item.references for item in task.items] == [("Paris",), ("2",)]
    assert tasks.load(file, scorer="contains").scorer == "contains"
    assert len(tasks.load(file, limit=1).items) == 1
    with pytest.raises(RequestError, match="no scorer 'numbr'") as caught:
        tasks.load(file, scorer="numbr")
    assert caught.value.hint and "number" in caught.value.hint


def test_lines_that_are_no_question_are_told_with_their_number_and_left_out(tmp_path: Path) -> None:
    file = written(
        tmp_path / "bad.jsonl",
        "not json",
        GSM8K,
        {"question": ""},
        {"turns": "abc", "id": 1},
        [1],
        {"prompt": "x", "reference": " "},
        {"prompt": "x", "references": ["a", ""]},
        {"prompt": "x"},
        {"id": "2", "prompt": "x", "reference": "y"},
        {"prompt": "\ud800", "reference": "y"},
        {"messages": [{"role": "nobody", "content": "x"}], "reference": "y"},
    )
    task = tasks.load(file, scorer="number")
    assert [item.id for item in task.items] == ["2"]
    told = {int(problem.partition(": ")[0].rpartition(":")[2]): problem.partition(": ")[2] for problem in task.problems}
    assert sorted(told) == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert "reference is empty" in told[6] and "number needs one" in told[8] and "stands twice" in told[9]


@pytest.mark.parametrize("text", ["", "nothing\n", '{"prompt": ""}'])
def test_a_file_without_a_question_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.jsonl").write_text(text)
    with pytest.raises(RequestError, match="no question in it"):
        tasks.load(str(tmp_path / "empty.jsonl"))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        tasks.load(str(tmp_path / "gone.jsonl"))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="not UTF-8"):
        tasks.load(str(tmp_path / "bytes.jsonl"))


def test_a_data_set_of_the_hub_is_read_by_its_library(tmp_path: Path) -> None:
    written(tmp_path / "test.jsonl", GSM8K, {"question": "1?", "answer": "#### 1"})
    task = tasks.load(f"hf:{tmp_path}", limit=2)
    assert task.scorer == "number" and [item.references[0] for item in task.items][1] == "#### 1"
    with pytest.raises(RequestError, match="cannot be loaded"):
        tasks.load(f"hf:{tmp_path / 'gone'}:main:test")


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("so it is 1,200.", "#### 1200", 1.0),
        ("12 is 1200.00", "#### 1200", 1.0),
        ("1200 and 7", "#### 1200", 0.0),
        ("no idea", "#### 1200", 0.0),
        ("-3", "3", 0.0),
    ],
)
def test_numbers_are_compared_as_numbers(answer: str, reference: str, right: float) -> None:
    assert scorers.number(answer, [reference]) == right


def test_the_other_scorers_do_as_they_are_called() -> None:
    assert scorers.choice("I think (B) is right. Answer: C", ["C"]) == 1.0
    assert scorers.exact(" Paris \n", ["paris"]) == 1.0 and scorers.exact("Paris!", ["Paris"]) == 0.0
    assert scorers.contains("It is  PARIS, of course", ["paris"]) == 1.0 and scorers.contains("Rome", ["paris"]) == 0.0


@given(st.integers(-(10**9), 10**9), st.text("abc .,\n", max_size=20))
def test_a_number_is_found_whatever_stands_before_it(value: int, before: str) -> None:
    assert scorers.number(f"{before} {value:,}", [f"#### {value}"]) == 1.0


def length(answer: str, references: Any) -> float:
    return float(len(answer) > 3)


def test_a_package_brings_a_scorer_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("long", f"{__name__}:length", scorers.SCORERS.group)
    monkeypatch.setattr(plugins, "entry_points", lambda group, name=None: [point] if name in (None, "long") else [])
    assert "long" in scorers.SCORERS.names() and scorers.scorer("long")("four", []) == 1.0
