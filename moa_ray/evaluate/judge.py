"""Models that say which of two answers is better: both orders, ties, and what they could not say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from moa_ray.evaluate import trials
from moa_ray.evaluate.arms import Arm
from moa_ray.evaluate.served import Served
from moa_ray.evaluate.tasks import Item, Task
from moa_ray.evaluate.trials import Trial
from moa_ray.graph import Message
from moa_ray.graph.prompts import defused

_ASKED = """\
Compare two answers to the same request. Judge how correct, helpful and to the point they are; neither their length
nor their order counts. Explain yourself in a few sentences, then end with [[A]] if answer A is better, [[B]] if answer
B is better, or [[C]] if they are equally good."""
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_WORTH = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclass(frozen=True, slots=True)
class Preference:
    """What one judge says of two answers to one question.

    Args:
        judge: Name of the judge.
        item: Id of the question.
        shown_first: How good ours is beside the other, 1 better, 0.5 equal, 0 worse, where it was shown first; None
            where the judge failed or said none of these.
        shown_second: The same, shown second.
        lengths: Characters of our answer and of the other.
    """

    judge: str
    item: str
    shown_first: float | None
    shown_second: float | None
    lengths: tuple[int, int]

    @property
    def decided(self) -> bool:
        """Whether the judge gave a verdict in both orders; in one alone its liking for a place would count."""
        return self.shown_first is not None and self.shown_second is not None

    @property
    def worth(self) -> float:
        """Both orders together: a judge that contradicts itself, or gives no verdict, says that they are equal."""
        if self.shown_first is None or self.shown_second is None:
            return 0.5
        return (self.shown_first + self.shown_second) / 2


async def compare(
    judges: Sequence[Arm],
    task: Task,
    ours: Sequence[Trial],
    theirs: Sequence[Trial],
    served: Served,
    *,
    concurrency: int,
    ended: Callable[[Trial], None],
) -> list[Preference]:
    """Have every judge compare two arms on every question; an arm that failed on one has lost it, unasked."""
    pairs = {one.item: (one, other) for one, other in zip(ours, theirs, strict=True)}
    asked: list[Item] = []
    for item in task.items:
        one, other = pairs[item.id]
        if one.answers and other.answers:
            asked += [
                Item(f"{item.id}/first", _prompt(item, one.answers, other.answers)),
                Item(f"{item.id}/second", _prompt(item, other.answers, one.answers)),
            ]
    found: list[Preference] = []
    for judge in judges:
        said = await trials.run(
            judge, Task(task.name, tuple(asked), None), served, concurrency=concurrency, ended=ended
        )
        verdicts = {trial.item: _verdict(trial) for trial in said}
        for name, (one, other) in pairs.items():
            if one.answers and other.answers:
                first, second = verdicts[f"{name}/first"], verdicts[f"{name}/second"]
                second = None if second is None else 1 - second
            else:
                first = second = 0.5 + 0.5 * (bool(one.answers) - bool(other.answers))
            found.append(Preference(judge.name, name, first, second, (one.length, other.length)))
    return found


def together(preferences: Sequence[Preference]) -> list[tuple[float, tuple[int, int]]]:
    """The mean of all judges on each question, and the lengths; of those that decided, where any did."""
    by_item: dict[str, list[Preference]] = {}
    for preference in preferences:
        by_item.setdefault(preference.item, []).append(preference)
    return [
        (fmean(each.worth for each in [p for p in said if p.decided] or said), said[0].lengths)
        for said in by_item.values()
    ]


def _verdict(trial: Trial) -> float | None:
    """What the first answer is worth, by the last verdict; None where there is none."""
    found = _VERDICT.findall(trial.answers[-1]) if trial.answers else []
    return _WORTH[found[-1]] if found else None


def _prompt(item: Item, first: Sequence[str], second: Sequence[str]) -> tuple[Message, ...]:
    asked = "\n\n".join(f"{message['role']}: {message['content']}" for message in item.messages)
    parts = [f"<request>\n{_conversation(asked, item.follow_ups)}\n</request>"]
    if item.references:
        parts.append("<reference>\n" + "\n\n".join(item.references) + "\n</reference>")
    for name, texts in (("A", first), ("B", second)):
        parts.append(f"<answer {name}>\n" + "\n\n".join(map(_told, texts)) + f"\n</answer {name}>")
    return ({"role": "system", "content": _ASKED}, {"role": "user", "content": "\n\n".join(parts)})


def _told(answer: str) -> str:
    """An answer that ends where it ends, whatever it says."""
    return defused(answer).replace("</answer", "<\\/answer").replace("<answer", "<\\answer")


def _conversation(asked: str, follow_ups: Sequence[str]) -> str:
    return "\n\n".join([asked, *(f"then, after the answer: {text}" for text in follow_ups)])
