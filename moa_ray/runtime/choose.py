"""Aggregators that take one of the proposals instead of writing a new answer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from moa_ray.graph.spec import Vote

_PATTERNS = {
    "number": r"(-?\d[\d,]*(?:\.\d+)?)",
    "choice": r"\b([A-Z])\b",
    "last_line": r"([^\n]+)\s*\Z",
}


def vote(proposals: Sequence[str], rule: Vote, weights: Sequence[float] = ()) -> tuple[int, str]:
    """The proposal that holds the most frequent answer (self-consistency, Wang et al. 2022, section 2).

    Ties go to the answer that comes first, and of its voters the first speaks.

    Args:
        proposals: At least one.
        rule: How an answer is found in a proposal.
        weights: How much each vote counts, as a gate weighs experts (Shazeer et al. 2017, eq. 1); not given: the same.

    Returns:
        The proposal's index, and a note that counts the votes.
    """
    answers = [extract(text, rule) for text in proposals]
    counts: defaultdict[str, float] = defaultdict(float)
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        if answer is not None:
            counts[answer] += weight
    if not counts:
        return 0, f"none of {len(proposals)} proposals holds an answer to vote on; the first one was taken"
    winner = max(counts, key=counts.__getitem__)
    share = counts[winner] / (sum(counts.values()) or 1.0)
    of_weight = f" with {share:.0%} of the weight" if weights else ""
    return answers.index(winner), f"{answers.count(winner)} of {len(proposals)} proposals voted for {winner}{of_weight}"


def extract(text: str, rule: Vote) -> str | None:
    """The answer that a text holds, in one spelling; None where it holds none."""
    pattern = rule.pattern if rule.extract == "regex" and rule.pattern else _PATTERNS[rule.extract]
    found = [match[1] if match.re.groups else match[0] for match in re.finditer(pattern, text.rstrip())]
    if not found or found[-1] is None:
        return None
    return _number(found[-1]) if rule.extract == "number" else found[-1].strip()


def _number(text: str) -> str:
    """One spelling for one number: 1,200 and 1200.00 are the same vote."""
    try:
        value = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return text
    return format(value.normalize() + 0, "f")


def picked(verdict: str, proposals: int) -> tuple[int, str]:
    """The proposal that a ranking agent named.

    Args:
        verdict: What it said.
        proposals: How many there were.

    Returns:
        The proposal's index, and a note; an unusable verdict takes the first proposal and says so.
    """
    for number in map(int, re.findall(r"\d+", verdict)):
        if 1 <= number <= proposals:
            return number - 1, f"the judge picked proposal {number} of {proposals}"
    return 0, f"the judge named none of {proposals} proposals ({verdict.strip()[:40]!r}); the first one was taken"
