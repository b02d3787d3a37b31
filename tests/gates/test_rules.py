from __future__ import annotations

from typing import Any

import pytest

from moa_ray.gates import Question
from moa_ray.gates.rules import Rules, RulesOptions
from moa_ray.graph import Message

AGENTS = ("coder", "poet", "lawyer")


async def chosen(text: str | tuple[Message, ...], *rules: tuple[dict[str, Any], str], **options: Any) -> list[str]:
    messages: tuple[Message, ...] = ({"role": "user", "content": text},) if isinstance(text, str) else text
    given = [{"when": when, "agents": agents.split()} for when, agents in rules]
    gate = Rules(RulesOptions.model_validate({"rules": given, **options}))
    return list((await gate.choose(Question(messages, AGENTS))).weights)


@pytest.mark.parametrize(
    ("when", "yes", "no"),
    [
        ({"matches": r"\bsql\b"}, "Write some SQL", "sqlite"),
        ({"longer_than": 5}, "123456", "12345"),
        ({"shorter_than": 5}, "1234", "12345"),
        ({"code": True}, "Why?\n```\nx = 1\n```", "Tell me of import duties; and of class struggle"),
        ({"code": True}, "def f(x):\n    return x", "define a function for me"),
        ({"code": False}, "a poem", "int main() {\n  return 0;\n}"),
        ({"language": "de"}, "Warum ist der Himmel eigentlich blau?", "Why is the sky actually blue?"),
        ({"matches": "law", "longer_than": 10}, "what is the law?", "law"),
    ],
)
async def test_a_rule_holds_for_what_it_says(when: dict[str, Any], yes: str, no: str) -> None:
    assert await chosen(yes, (when, "coder")) == ["coder"]
    assert await chosen(no, (when, "coder")) == list(AGENTS)


async def test_a_rule_sees_the_whole_conversation() -> None:
    tool: tuple[Message, ...] = ({"role": "user", "content": "x"}, {"role": "tool", "content": "42"})
    assert await chosen(tool, ({"tool_turn": True}, "poet")) == ["poet"]
    twice: tuple[Message, ...] = ({"role": "user", "content": "x"}, {"role": "user", "content": "y"})
    assert await chosen(twice, ({"turns": 2}, "poet")) == ["poet"]
    assert await chosen("x", ({"turns": 2}, "poet")) == list(AGENTS)


async def test_the_first_rule_that_fits_counts_and_then_what_is_said_otherwise() -> None:
    rules = (({"matches": "a"}, "poet coder"), ({"matches": "b"}, "lawyer"))
    assert await chosen("ab", *rules) == ["poet", "coder"]
    assert await chosen("b", *rules) == ["lawyer"]
    assert await chosen("c", *rules, otherwise=["coder"]) == ["coder"]
