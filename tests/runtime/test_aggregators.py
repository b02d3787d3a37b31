"""Aggregators that a package brings; tests/graph/test_plugins.py installs one for real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from moa_ray.errors import MoARayError
from moa_ray.graph import Graph, aggregators, draw, from_dict
from moa_ray.runtime import RunOptions
from tests.runtime.panels import runner


class Returning(aggregators.Aggregator):
    value: Any

    def aggregate(self, proposals: Sequence[str]) -> int | str:
        if isinstance(self.value, list):
            raise ValueError("no lists")
        return self.value if isinstance(self.value, int) else f"{self.value}: {' | '.join(proposals)}"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregators.KINDS, "_built_in", {"returning": Returning})
    monkeypatch.setattr(aggregators.KINDS, "_found", {})


def returning(value: Any) -> Graph:
    script = {"kind": "scripted", "model": "m", "reply": "{agent}", "faults": [{"agent": "c", "kind": "refused"}]}
    return from_dict(
        {
            "version": 1,
            "name": "panel",
            "engines": {"script": script},
            "agents": {name: {"engine": "script"} for name in "abc"},
            "layers": [["c", "b", "a"]],
            "aggregator": {"kind": "returning", "value": value},
        }
    )


@pytest.mark.parametrize(
    ("value", "text", "source", "note"),
    [
        (1, "a", "1/a", "returning took proposal 2 of 2"),
        ("all", "all: b | a", "answer", "returning wrote it out of 2 proposals"),
    ],
)
async def test_it_takes_or_writes_an_answer_of_the_proposals_that_there_are(
    value: Any, text: str, source: str, note: str
) -> None:
    run, engine = runner(returning(value))
    result = await run.run("why?")
    assert (result.text, result.source, result.note) == (text, source, note)
    assert sorted(call.agent for call in engine.calls) == ["a", "b", "c"]


async def test_as_a_step_of_another_engine_it_makes_the_same_of_what_it_is_shown() -> None:
    run, engine = runner(returning("all"))
    result = await run.run("why?", RunOptions(call="answer", proposals={"1/a": "a", "1/b": "b"}))
    assert result.text == "all: b | a" and not engine.calls


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "the aggregator returning failed: ValueError: no lists"),
        (2, "the aggregator returning returned 2: neither a text nor the index of a proposal, of which there are 2"),
        (-1, "returned -1: neither"),
        (True, "returned True: neither"),
    ],
)
async def test_one_that_fails_or_returns_nonsense_fails_the_request_in_a_line(value: Any, message: str) -> None:
    run, _ = runner(returning(value))
    with pytest.raises(MoARayError, match=message):
        await run.run("why?")


def test_it_is_drawn_by_its_name() -> None:
    assert "returning (plug-in)" in draw.terminal(returning(0))
