"""What agents' answers to questions were worth: the training data of learned gates.

A JSON object a line: `prompt`, or `messages` as OpenAI has them; `rewards`, from 0 to 1, by agent, and `panel`, that of
the whole graph's answer; and, where they are to count, the `tokens` that each agent took, and `panel_tokens`. Of lines
with the same `id` the last counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from moa_ray.errors import MoARayError, SpecError
from moa_ray.graph import Message, conversation
from moa_ray.graph.source import which

Reward = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Outcome(BaseModel):
    """One question, and what the agents' answers to it were worth."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str = ""
    prompt: str = ""
    messages: list[dict[str, Any]] = Field(default_factory=list)
    rewards: dict[str, Reward] = Field(default_factory=dict)
    panel: Reward | None = None
    tokens: dict[str, NonNegativeInt] = Field(default_factory=dict)
    panel_tokens: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _has_one_question_and_a_reward(self) -> Outcome:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError('give "prompt" or "messages"')
        if not self.rewards and self.panel is None:
            raise ValueError('give "rewards" of agents, or that of the "panel"')
        return self

    def of(self, agents: Sequence[str]) -> Iterator[tuple[float | None, int | None]]:
        """Reward and tokens of each of `agents`, and of the panel; None where they were not recorded."""
        for agent in agents:
            yield self.rewards.get(agent), self.tokens.get(agent)
        yield self.panel, self.panel_tokens


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Recorded outcomes of N questions for E agents.

    Args:
        questions: What stands for each question in the gate's embedding, N of them.
        rewards: (N, E + 1), float32, the whole panel's last; NaN where an answer was not judged.
        tokens: (E + 1,), float32: mean tokens of an answer of each agent, all 1 where none were recorded; and of the
            panel, the agents' sum where they were not.
    """

    questions: Sequence[str]
    rewards: NDArray[np.float32]
    tokens: NDArray[np.float32]


def load(path: Path, agents: Sequence[str], *, with_panel: bool = False) -> Outcomes:
    """The outcomes in `path` for `agents`, in their order.

    Args:
        path: The file.
        agents: E agents.
        with_panel: Whether the panel's own answers must have been judged.

    Raises:
        SpecError: With file and line, for a line that is none, an agent that is not there, or a reward that is no
            number from 0 to 1; and where somebody was never judged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: the file is not UTF-8 text") from None
    parsed = [(number, _outcome(path, number, line)) for number, line in enumerate(lines, start=1) if line.strip()]
    found = list({outcome.id or number: (number, outcome) for number, outcome in parsed}.values())
    rewards = np.full((len(found), len(agents) + 1), np.nan, np.float32)
    spent: list[list[int]] = [[] for _ in range(len(agents) + 1)]
    for row, (number, outcome) in enumerate(found):
        for agent in {**outcome.rewards, **outcome.tokens}:
            if agent not in agents:
                hint = which(agent, agents)
                raise SpecError(f"{path}:{number}: no layer has an agent {agent!r}", hint=hint)
        for column, (reward, tokens) in enumerate(outcome.of(agents)):
            rewards[row, column] = np.nan if reward is None else reward
            spent[column] += [] if tokens is None else [tokens]
    questions = [_question(path, number, outcome) for number, outcome in found]
    needed = [f"the agent {agent!r}" for agent in agents] + ["the panel"] * with_panel
    for column, who in enumerate(needed):
        if np.isnan(rewards[:, column]).all():
            raise SpecError(f"{path}: no answer of {who} was judged", hint="each needs some")
    return Outcomes(questions, rewards, _mean_tokens(spent))


def _mean_tokens(spent: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Mean of each; where there is none the agents' mean, or 1, and for the last one their sum."""
    mean = np.array([np.mean(each) if each else np.nan for each in spent], np.float32)
    usual = float(np.nanmean(mean[:-1])) if any(spent[:-1]) else 1.0
    agents = np.nan_to_num(mean[:-1], nan=usual)
    return np.append(agents, np.nan_to_num(mean[-1], nan=agents.sum())).astype(np.float32)


def text_of(messages: Sequence[Message]) -> str:
    """What of a conversation a learned gate looks at: its last message."""
    return messages[-1]["content"]


def _outcome(path: Path, number: int, line: str) -> Outcome:
    try:
        return Outcome.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SpecError(f"{path}:{number}: {where + ': ' if where else ''}{first['msg']}") from None


def _question(path: Path, number: int, outcome: Outcome) -> str:
    asked: Any = outcome.prompt or outcome.messages
    try:
        return text_of(conversation(asked))
    except MoARayError as error:
        raise SpecError(f"{path}:{number}: {error.message}", hint=error.hint) from None
