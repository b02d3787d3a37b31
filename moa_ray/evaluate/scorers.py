"""How far an answer is right, from references: scorers by name, the built-in ones and those of installed packages.

A package brings its own by the entry point group `moa_ray.scorers`: a function of an answer and its references that
returns a number from 0 (wrong) to 1 (right).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moa_ray.errors import RequestError, SpecError
from moa_ray.graph.plugins import Plugins
from moa_ray.graph.spec import Vote
from moa_ray.runtime.choose import extract

Scorer = Callable[[str, Sequence[str]], float]

VOTES = {"number": Vote(extract="number"), "choice": Vote(extract="choice")}
"""Scorers that look at a part of the answer, which can be voted on."""


def number(answer: str, references: Sequence[str]) -> float:
    """Whether the last number of the answer is that of a reference, as GSM8K is scored (Cobbe et al. 2021)."""
    return _same_part(answer, references, VOTES["number"])


def choice(answer: str, references: Sequence[str]) -> float:
    """Whether the last choice letter of the answer is that of a reference."""
    return _same_part(answer, references, VOTES["choice"])


def exact(answer: str, references: Sequence[str]) -> float:
    """Whether the answer is a reference, case and white space aside."""
    return float(_plain(answer) in map(_plain, references))


def contains(answer: str, references: Sequence[str]) -> float:
    """Whether a reference stands in the answer, case and white space aside."""
    return float(any(_plain(reference) in _plain(answer) for reference in references))


SCORERS: Plugins[Scorer] = Plugins(
    "moa_ray.scorers", "scorer", {"number": number, "choice": choice, "exact": exact, "contains": contains}
)


def scorer(name: str) -> Scorer:
    """The scorer called `name`.

    Raises:
        RequestError: If there is none, or it cannot be loaded.
    """
    try:
        return SCORERS.find(name)
    except SpecError as error:
        raise RequestError(error.message, hint=error.hint) from None


def _same_part(answer: str, references: Sequence[str], part: Vote) -> float:
    found = extract(answer, part)
    return float(found is not None and found in (extract(reference, part) for reference in references))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
