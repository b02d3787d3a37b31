"""What people say of answers, written down as outcomes from which a gate learns.

The form of a line is that of `learned.outcomes`.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_ray.errors import MoARayError, RequestError
from moa_ray.graph import Message

_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Part:
    """Who made one choice of an answer.

    Args:
        tokens: Tokens that each proposer took, prompt and completion, by agent.
        panel_tokens: Tokens of the whole panel, its aggregator's too; None where an agent answered alone.
    """

    tokens: Mapping[str, int]
    panel_tokens: int | None


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer that may be judged.

    Args:
        id: The server's id of it.
        model: The graph.
        messages: The conversation that it answers.
        parts: Its choices.
    """

    id: str
    model: str
    messages: tuple[Message, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What somebody says of an answer.

    Args:
        id: The answer's id.
        reward: From 0, bad, to 1, good.
        choice: Which of its choices.
    """

    id: str
    reward: float
    choice: int = 0


class Feedback:
    """Remembers the latest answers, and writes what is said of them to a file, a line each.

    Every agent that took part in an answer gets its reward, and the panel as a whole. Who judges an answer again is
    believed: of several lines with one id, the last counts in training.

    Args:
        path: The file; it and its folder are made where they are missing.
        most: Answers that are remembered.
    """

    def __init__(self, path: Path, most: int = _REMEMBERED) -> None:
        self._path, self._most = path, most
        self._answers: OrderedDict[str, Answered] = OrderedDict()

    def __contains__(self, id: str) -> bool:
        return id in self._answers

    def remember(self, answered: Answered) -> None:
        """Keep an answer, in the place of the oldest where there are too many."""
        self._answers[answered.id] = answered
        if len(self._answers) > self._most:
            self._answers.popitem(last=False)

    def judge(self, judgement: Judgement) -> None:
        """Write down what is said of an answer.

        Raises:
            RequestError: If there is no such answer among the latest, or it has no such choice.
            MoARayError: If the file cannot be written.
        """
        answered = self._answers.get(judgement.id)
        if answered is None:
            hint = f"the latest {self._most} answers of graphs can be judged, by the id that they came with"
            raise RequestError(f"there is no answer {judgement.id!r} to judge", hint=hint)
        if judgement.choice >= len(answered.parts):
            raise RequestError(f"choice: the answer has {len(answered.parts)}, counted from 0")
        line = json.dumps(_outcome(answered, judgement), ensure_ascii=False)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise MoARayError(f"the judgement cannot be kept: {self._path}: {error.strerror}") from None


def _outcome(answered: Answered, judgement: Judgement) -> dict[str, Any]:
    part = answered.parts[judgement.choice]
    outcome: dict[str, Any] = {
        "id": f"{answered.id}/{judgement.choice}",
        "model": answered.model,
        "messages": answered.messages,
        "rewards": dict.fromkeys(part.tokens, judgement.reward),
        "tokens": dict(part.tokens),
    }
    if part.panel_tokens is not None:
        outcome |= {"panel": judgement.reward, "panel_tokens": part.panel_tokens}
    return outcome
