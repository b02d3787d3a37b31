"""Gates that look at nothing: everybody, or anybody."""

from __future__ import annotations

import random
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from moa_ray.errors import SpecError
from moa_ray.gates.protocol import Choice, Question
from moa_ray.graph import Graph


class NoOptions(BaseModel):
    """A kind without keys of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class All:
    """Every agent, with the same weight: the paper's Mixture-of-Agents."""

    Options: ClassVar[type[BaseModel]] = NoOptions
    timeout_s: ClassVar[float] = 0.05
    has_model: ClassVar[bool] = False

    @classmethod
    def check(cls, graph: Graph, options: BaseModel) -> None:
        """Nothing can be wrong."""

    @classmethod
    def create(cls, graph: Graph, options: BaseModel) -> All:
        """The gate."""
        return cls()

    async def choose(self, question: Question) -> Choice:
        """Weight 1 for each."""
        return Choice(dict.fromkeys(question.agents, 1.0))

    async def close(self) -> None:
        """Nothing to give back."""


class RandomOptions(NoOptions):
    """Keys of `gate: {kind: random}`."""

    seed: int | None = None
    """Makes a sequence of requests reproducible."""


class Random(All):
    """`k` agents of each layer, drawn anew for each request: the control of every other gate."""

    Options: ClassVar[type[BaseModel]] = RandomOptions

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    @classmethod
    def check(cls, graph: Graph, options: BaseModel) -> None:
        """Without a number there is nothing to draw."""
        if graph.spec.gate.k is None:
            raise SpecError("a random gate needs k", hint="gate: {kind: random, k: 2}")

    @classmethod
    def create(cls, graph: Graph, options: BaseModel) -> Random:
        """The gate."""
        return cls(RandomOptions.model_validate(options).seed)

    async def choose(self, question: Question) -> Choice:
        """A random order; the weights are those of equals."""
        order = list(question.agents)
        self._random.shuffle(order)
        return Choice({agent: 1.0 for agent in order})
