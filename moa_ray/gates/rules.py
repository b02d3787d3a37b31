"""A gate of written rules: the first one that fits the question says who answers."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

from moa_ray.errors import SpecError
from moa_ray.gates.protocol import Choice, Question
from moa_ray.graph import Graph, Message
from moa_ray.graph.source import which

_CODE = re.compile(r"```|^\s*(def|class|import|from|#include|public|func|SELECT|\$)\b.*|[;{}]\s*$", re.MULTILINE)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"this is no regular expression: {error}") from None
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class When(_Strict):
    """What must hold, all of it, for the last message."""

    matches: Annotated[str, AfterValidator(_pattern)] | None = None
    """A regular expression that is found in it; case does not count."""
    longer_than: PositiveInt | None = None
    """It has more characters than this."""
    shorter_than: PositiveInt | None = None
    """It has fewer characters than this."""
    code: bool | None = None
    """Whether there is program code in it."""
    language: str | None = Field(None, pattern="^[a-z]{2}$")
    """The natural language that it is in, by its two letters (ISO 639-1); needs the extra `gate`."""
    tool_turn: bool | None = None
    """Whether it is a tool's answer, or there are calls of tools in the conversation."""
    turns: PositiveInt | None = None
    """The conversation has at least so many turns of the user."""


class Rule(_Strict):
    """Who answers what."""

    when: When
    """What must hold."""
    agents: list[str] = Field(min_length=1)
    """Who answers then; with `k`, the first so many of each layer."""


class RulesOptions(_Strict):
    """Keys of `gate: {kind: rules}`."""

    rules: list[Rule] = Field(min_length=1)
    """The first that fits counts."""
    otherwise: list[str] = Field(default_factory=list)
    """Who answers where none fits; not given: everybody."""


class Rules:
    """A `Gate`. Make it with `create`."""

    Options: ClassVar[type[BaseModel]] = RulesOptions
    timeout_s: ClassVar[float] = 0.05
    has_model: ClassVar[bool] = False

    def __init__(self, options: RulesOptions) -> None:
        self._options = options
        self._languages = _language_of() if any(rule.when.language for rule in options.rules) else None

    @classmethod
    def check(cls, graph: Graph, options: BaseModel) -> None:
        """Every name must be that of a proposer."""
        checked = RulesOptions.model_validate(options)
        proposers = {call.agent for call in graph.calls}
        named = [(f"rules.{number}.agents", rule.agents) for number, rule in enumerate(checked.rules)]
        for where, names in [*named, ("otherwise", checked.otherwise)]:
            for name in names:
                if name not in proposers:
                    hint = which(name, sorted(proposers))
                    raise SpecError(f"{where}: no layer has an agent {name!r}", hint=hint)

    @classmethod
    def create(cls, graph: Graph, options: BaseModel) -> Rules:
        """The gate."""
        return cls(RulesOptions.model_validate(options))

    async def choose(self, question: Question) -> Choice:
        """The agents of the first rule that fits."""
        for number, rule in enumerate(self._options.rules, start=1):
            if self._fits(rule.when, question.messages):
                return Choice(dict.fromkeys(rule.agents, 1.0), note=f"rule {number}")
        return Choice(dict.fromkeys(self._options.otherwise or question.agents, 1.0), note="no rule fits")

    async def close(self) -> None:
        """Nothing to give back."""

    def _fits(self, when: When, messages: tuple[Message, ...]) -> bool:
        text = messages[-1]["content"]
        wanted = when.model_dump(exclude_none=True)
        return all(
            _HOLDS[key](text, messages, value)
            if key != "language"
            else self._languages is not None and self._languages(text)[0] == value
            for key, value in wanted.items()
        )


_HOLDS: dict[str, Any] = {
    "matches": lambda text, _, pattern: re.search(pattern, text, re.IGNORECASE) is not None,
    "longer_than": lambda text, _, length: len(text) > length,
    "shorter_than": lambda text, _, length: len(text) < length,
    "code": lambda text, _, wanted: (_CODE.search(text) is not None) == wanted,
    "tool_turn": lambda _, messages, wanted: (
        any(m["role"] == "tool" or m.get("tool_calls") for m in messages) == wanted
    ),
    "turns": lambda _, messages, least: sum(m["role"] == "user" for m in messages) >= least,
}


def _language_of() -> Any:
    """A function from a text to the two letters of its language, and how sure that is."""
    try:
        from py3langid import classify
    except ImportError as error:
        raise SpecError("rules on the language need py3langid", hint="pip install 'moa-ray[gate]'") from error
    return classify
