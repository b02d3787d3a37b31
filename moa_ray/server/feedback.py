"""`/v1/feedback`: what a caller says of an answer, and what of an answer has to be remembered for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from moa_ray.gates.feedback import Answered, Judgement, Part
from moa_ray.graph import ANSWER, Message
from moa_ray.server.runs import Choice

_Reward = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class FeedbackRequest(BaseModel):
    """Body of `POST /v1/feedback`."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"id": "chatcmpl-1", "thumb": "up"}, {"id": "resp_1", "reward": 0.5}]},
    )

    id: str = Field(min_length=1, max_length=128)
    """The answer's."""
    thumb: Literal["up", "down"] | None = None
    """A reward of 1 or 0."""
    reward: _Reward | None = None
    """From 0, bad, to 1, good, in place of a thumb."""
    choice: NonNegativeInt = 0
    """Which of the answer's choices."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> FeedbackRequest:
        if (self.thumb is None) == (self.reward is None):
            raise ValueError("give a thumb or a reward")
        return self

    def judgement(self) -> Judgement:
        """The same as the rest of moa-ray has it."""
        reward = float(self.thumb == "up") if self.reward is None else self.reward
        return Judgement(self.id, reward, self.choice)


def answered(id: str, model: str, messages: Sequence[Message], choices: Sequence[Choice]) -> Answered | None:
    """What of an answer is remembered; None for one of a single agent, of which no gate learns."""
    parts = tuple(map(_part, choices))
    return Answered(id, model, tuple(messages), parts) if any(part.tokens for part in parts) else None


def _part(choice: Choice) -> Part:
    ledger = choice.ledger
    tokens: dict[str, int] = {}
    for record in ledger.records:
        if record.state == "finished" and record.layer and (record.call != ANSWER or _alone(choice)):
            usage = record.usage
            tokens[record.agent] = tokens.get(record.agent, 0) + usage.prompt_tokens + usage.completion_tokens
    whole = ledger.usage.prompt_tokens + ledger.usage.completion_tokens
    return Part(tokens, None if _alone(choice) else whole)


def _alone(choice: Choice) -> bool:
    gate = choice.ledger.gate
    return gate is not None and bool(gate.alone)
