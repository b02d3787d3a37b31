"""Gates that ask agents: one that lets an agent pick, and one that asks a cheap agent before the panel."""

from __future__ import annotations

import math
import re
from statistics import mean
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from moa_ray.errors import SpecError
from moa_ray.gates.protocol import Answer, Choice, Question
from moa_ray.graph import Graph, Message, agreement
from moa_ray.graph.source import which

_PICK = (
    "Who should answer the message above? Reply with the numbers of the {few} who know most about it, best first, "
    "and nothing else.\n\n{agents}"
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _agent(graph: Graph) -> str:
    """Who is asked."""
    gate = graph.spec.gate
    if gate.agent is None:
        raise SpecError(f"a gate of kind {gate.kind} asks an agent", hint=f"gate: {{kind: {gate.kind}, agent: NAME}}")
    return gate.agent


class LlmOptions(_Strict):
    """Keys of `gate: {kind: llm, agent: NAME}`."""

    about: dict[str, str] = Field(default_factory=dict)
    """What each agent is good at, for who picks; not given: its system prompt."""


class Llm:
    """An agent picks who answers. Make it with `create`.

    What it names first counts most: the weights are 1, 1/2, 1/3, ... before they are made to sum to 1.
    """

    Options: ClassVar[type[BaseModel]] = LlmOptions
    timeout_s: ClassVar[float] = 60.0
    has_model: ClassVar[bool] = False

    def __init__(self, graph: Graph, options: LlmOptions) -> None:
        self._agent = _agent(graph)
        self._few = graph.spec.gate.k or 1
        self._about = {
            name: " ".join((options.about.get(name) or agent.system or name).split())[:300]
            for name, agent in graph.spec.agents.items()
        }

    @classmethod
    def check(cls, graph: Graph, options: BaseModel) -> None:
        """Every name must be that of an agent."""
        _agent(graph)
        for name in LlmOptions.model_validate(options).about:
            if name not in graph.spec.agents:
                hint = which(name, graph.spec.agents)
                raise SpecError(f"about: there is no agent {name!r}", hint=hint)

    @classmethod
    def create(cls, graph: Graph, options: BaseModel) -> Llm:
        """The gate."""
        return cls(graph, LlmOptions.model_validate(options))

    async def choose(self, question: Question) -> Choice:
        """Ask; a verdict that names nobody chooses everybody."""
        numbered = "\n".join(f"{n}. {self._about[name]}" for n, name in enumerate(question.agents, start=1))
        few = "one" if self._few == 1 else str(self._few)
        asked: Message = {"role": "user", "content": _PICK.format(few=few, agents=numbered)}
        assert question.ask is not None
        (verdict,) = await question.ask(self._agent, (*question.messages, asked))
        numbers = dict.fromkeys(n for n in map(int, re.findall(r"\d+", verdict.text)) if 1 <= n <= len(question.agents))
        if not numbers:
            note = f"{self._agent} named nobody ({verdict.text.strip()[:40]!r})"
            return Choice(dict.fromkeys(question.agents, 1.0), note=note)
        named = [question.agents[number - 1] for number in numbers]
        return Choice({name: 1 / rank for rank, name in enumerate(named, start=1)}, note=f"picked by {self._agent}")

    async def close(self) -> None:
        """Nothing to give back."""


class CascadeOptions(_Strict):
    """Keys of `gate: {kind: cascade, agent: NAME}`."""

    confidence: Literal["agreement", "logprob"] = "agreement"
    """`agreement`: how far `samples` answers of it say the same; `logprob`: the mean probability of a token of its
    answer, exp of the mean log-probability, where the engine tells it."""
    threshold: float = Field(0.8, gt=0, le=1)
    """A confidence of at least this keeps its answer; below it, the panel is asked."""
    samples: int = Field(3, ge=2, le=16)
    """`agreement`: answers that are compared."""
    measure: str = "exact"
    """`agreement`: how they are compared: `exact`, `words`, or what a plug-in brings (see `policy.early_exit`)."""


class Cascade:
    """A cheap agent first, the panel only where it is not confident (FrugalGPT, Chen et al. 2023, section 3).

    Make it with `create`.
    """

    Options: ClassVar[type[BaseModel]] = CascadeOptions
    timeout_s: ClassVar[float] = 60.0
    has_model: ClassVar[bool] = False

    def __init__(self, agent: str, options: CascadeOptions) -> None:
        self._agent = agent
        self._options = options

    @classmethod
    def check(cls, graph: Graph, options: BaseModel) -> None:
        """The agent and the measure must be there."""
        checked = CascadeOptions.model_validate(options)
        if checked.confidence == "agreement" and graph.spec.agents[_agent(graph)].temperature == 0:
            raise SpecError(
                f"the samples of {_agent(graph)} always agree, since its temperature is 0",
                hint="give it a temperature, or the gate confidence: logprob",
            )
        try:
            agreement.MEASURES.find(checked.measure)
        except SpecError as error:
            raise SpecError(f"measure: {error.message}", hint=error.hint) from None

    @classmethod
    def create(cls, graph: Graph, options: BaseModel) -> Cascade:
        """The gate."""
        return cls(_agent(graph), CascadeOptions.model_validate(options))

    async def choose(self, question: Question) -> Choice:
        """Ask the cheap agent, and keep its answer if it is confident."""
        own, weights = self._options, dict.fromkeys(question.agents, 1.0)
        if question.wants:
            return Choice(weights, note=f"an answer with {', '.join(sorted(question.wants))} is the aggregator's")
        assert question.ask is not None
        samples = own.samples if own.confidence == "agreement" else 1
        logprobs = own.confidence == "logprob"
        answers = await question.ask(self._agent, question.messages, samples=samples, logprobs=logprobs)
        confidence = self._confidence(answers)
        if confidence is None:
            return Choice(weights, note=f"the engine of {self._agent} tells no log-probabilities")
        note = f"{self._agent} is confident to {confidence:.2f}, {own.threshold:g} needed"
        if confidence < own.threshold:
            return Choice(weights, note=note)
        return Choice(weights, answer=self._typical(answers), note=note)

    async def close(self) -> None:
        """Nothing to give back."""

    def _confidence(self, answers: list[Answer]) -> float | None:
        if self._options.confidence == "agreement":
            return agreement.MEASURES.find(self._options.measure)([answer.text for answer in answers])
        (answer,) = answers
        return None if answer.logprob is None else math.exp(answer.logprob)

    def _typical(self, answers: list[Answer]) -> Answer:
        """The answer that agrees best with the others; of equals the first."""
        if len(answers) == 1:
            return answers[0]
        measure = agreement.MEASURES.find(self._options.measure)
        return max(
            answers,
            key=lambda one: mean(measure([one.text, other.text]) for other in answers if other is not one),
        )
