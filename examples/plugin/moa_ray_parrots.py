"""One plug-in of moa-ray of each sort. `pyproject.toml` says under which name each is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, PositiveInt

from moa_ray.engines import Chunk, EngineInfo, EngineRequest, Usage
from moa_ray.gates import Choice, Question
from moa_ray.graph import Graph, Message, Resources
from moa_ray.graph.aggregators import Aggregator

# ---------------------------------------------------------------- an engine: `kind: parrot` under `engines`


class ParrotOptions(BaseModel):
    """Keys of an engine of `kind: parrot`."""

    model_config = ConfigDict(extra="forbid")

    times: PositiveInt = 1
    """How often it says the question."""


class Parrot:
    """An engine that says the last message again."""

    Options = ParrotOptions

    def __init__(self, times: int) -> None:
        self._times = times

    @classmethod
    def default_resources(cls, options: BaseModel) -> Resources:
        """It computes nothing."""
        return Resources(num_cpus=0)

    @classmethod
    async def create(cls, model: str, options: BaseModel, *, num_cpus: float) -> Parrot:
        """A ready one."""
        return cls(ParrotOptions.model_validate(options).times)

    async def info(self) -> EngineInfo:
        """What it can."""
        return EngineInfo("parrot")

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """The last message's words, one by one."""
        words = str(request.messages[-1]["content"]).split()
        for word in words * self._times:
            yield Chunk(f"{word} ", 1)
        yield Chunk("", 0, finish_reason="stop", usage=Usage(len(words), len(words) * self._times))

    async def warm(self, request: EngineRequest) -> Usage:
        """It keeps no beginnings of prompts."""
        return Usage()

    async def count_tokens(self, messages: tuple[Message, ...]) -> int:
        """A word is a token."""
        return sum(len(str(message["content"]).split()) for message in messages)

    async def close(self) -> None:
        """Nothing to give back."""


# ---------------------------------------------------------------- a gate: `kind: by_length` under `gate`


class ByLengthOptions(BaseModel):
    """Keys of a gate of `kind: by_length`."""

    model_config = ConfigDict(extra="forbid")

    words: PositiveInt
    """A question of fewer words is for the first agent alone."""


class ByLength:
    """A gate that asks everybody only where the question is long."""

    Options: ClassVar[type[BaseModel]] = ByLengthOptions
    timeout_s: ClassVar[float] = 0.05
    has_model: ClassVar[bool] = False

    def __init__(self, words: int) -> None:
        self._words = words

    @classmethod
    def check(cls, graph: Graph, options: BaseModel) -> None:
        """It fits every graph."""

    @classmethod
    def create(cls, graph: Graph, options: BaseModel) -> ByLength:
        """A ready one."""
        return cls(ByLengthOptions.model_validate(options).words)

    async def choose(self, question: Question) -> Choice:
        """Who answers."""
        words = len(str(question.messages[-1]["content"]).split())
        asked = question.agents if words >= self._words else question.agents[:1]
        return Choice(dict.fromkeys(asked, 1.0), note=f"{words} words")

    async def close(self) -> None:
        """Nothing to give back."""


# ---------------------------------------------------------------- an aggregator: `aggregator: {kind: longest}`


class Longest(Aggregator):
    """Takes the longest proposal; its fields are its YAML keys."""

    at_most: PositiveInt = 10_000
    """Characters of an answer; a longer one is cut."""

    def aggregate(self, proposals: Sequence[str]) -> int | str:
        """The index of a proposal, or a text of its own."""
        longest = max(range(len(proposals)), key=lambda index: len(proposals[index]))
        return longest if len(proposals[longest]) <= self.at_most else proposals[longest][: self.at_most]


# ---------------------------------------------------------------- a scorer: `moa-ray eval --scorer brief`


def brief(answer: str, references: Sequence[str]) -> float:
    """Whether the answer is no longer than the longest reference."""
    return float(len(answer) <= max(map(len, references), default=0))


# ---------------------------------------------------------------- a measure: `early_exit: {measure: opening}`


def opening(texts: Sequence[str]) -> float:
    """The share of the texts that begin with the same word."""
    openings = Counter(text.split(maxsplit=1)[0].casefold() if text.split() else "" for text in texts)
    return openings.most_common(1)[0][1] / len(texts)
