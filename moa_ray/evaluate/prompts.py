"""What a load asks: lines of a file, or words drawn at random."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from moa_ray.errors import MoARayError, RequestError
from moa_ray.evaluate.tasks import asked_in, rows_of
from moa_ray.graph import Message

_WORDS = (
    "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with",
    "as", "at", "be", "this", "from", "have", "or", "by", "one", "had", "not", "but", "what",
    "all", "were", "when", "we", "there", "can", "an", "your", "which", "their", "said", "if", "do",
    "will", "each", "about", "how", "up", "out", "them", "then", "she", "many", "some", "so", "these",
    "would",
)  # fmt: skip


def from_file(path: Path, count: int) -> list[tuple[Message, ...]]:
    """`count` conversations out of a file of JSON lines, from its start again where it has fewer.

    A line has a `prompt`, `messages`, or `turns`, of which the first is asked, as MT-Bench has them.

    Raises:
        RequestError: With file and line, for a line that is none of these.
    """
    found = [_asked(where, row) for where, row in rows_of(path)]
    if not found:
        raise RequestError(f"{path}: the file holds no prompt")
    return [found[number % len(found)] for number in range(count)]


def made_up(count: int, words: int, seed: int) -> list[tuple[Message, ...]]:
    """`count` different prompts of so many common English words, about a token each."""
    dice = random.Random(seed)
    return [({"role": "user", "content": " ".join(dice.choices(_WORDS, k=words))},) for _ in range(count)]


def _asked(where: str, row: Any) -> tuple[Message, ...]:
    try:
        return asked_in(row)[0]
    except MoARayError as error:
        raise RequestError(f"{where}: {error.message}", hint=error.hint) from None
