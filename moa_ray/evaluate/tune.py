"""Which models propose, and which one aggregates: chosen by what they are worth in each role, not guessed.

Each model is measured alone, as an aggregator of everybody's proposals, and as the only proposer of the best
aggregator (the roles of Wang et al. 2024, Table 4). Proposers are then added one by one, the best first (greedy
forward selection). How many of them are kept is decided on questions that chose none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moa_ray.errors import RequestError
from moa_ray.evaluate.statistics import Array, Interval, bootstrap

Panel = tuple[tuple[str, ...], str | None]
"""Proposers, one of them as often as it answers, and the aggregator; a single model alone has none."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A panel, or a model alone, on all questions.

    Args:
        scores: (N,), of each question, from 0 to 1.
        tokens: Of a question on average.
        total_s: Median seconds along the critical path.
    """

    scores: Array
    tokens: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Budget:
    """What an answer may cost.

    Args:
        tokens: Most tokens of a question on average, prompts included; None for no bound.
        seconds: Longest median time; None for no bound.
    """

    tokens: float | None = None
    seconds: float | None = None

    def allows(self, measured: Measured) -> bool:
        """Whether it is kept."""
        cheap = self.tokens is None or measured.tokens <= self.tokens
        return cheap and (self.seconds is None or measured.total_s <= self.seconds)


@dataclass(frozen=True, slots=True)
class Roles:
    """What one model is worth, as mean scores of the questions that choose.

    Args:
        alone: Asked alone.
        proposer: As the only proposer, twice, of the best aggregator.
        aggregator: Of one proposal of each model.
    """

    alone: float
    proposer: float
    aggregator: float


@dataclass(frozen=True, slots=True)
class Step:
    """One more proposer.

    Args:
        panel: What is measured.
        chosen_on: Mean score of the questions that choose.
        held_out: Mean score of those that do not.
        tokens: Of a question.
        total_s: Median time.
    """

    panel: Panel
    chosen_on: float
    held_out: float
    tokens: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was chosen.

    Args:
        panel: The proposers and the aggregator, or one model and None where no panel is better.
        roles: By model.
        steps: The way there: the best model alone, then a proposer more each time.
        gain: Over the best model alone, on questions that chose neither; None where that is the choice.
    """

    panel: Panel
    roles: dict[str, Roles]
    steps: Sequence[Step]
    gain: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        proposers, aggregator = self.panel
        return {
            "proposers": list(proposers),
            "aggregator": aggregator,
            "roles": {model: asdict(roles) for model, roles in self.roles.items()},
            "steps": [asdict(step) for step in self.steps],
            "gain": None if self.gain is None else asdict(self.gain),
        }


async def choose(
    models: Sequence[str],
    measure: Callable[[Panel], Awaitable[Measured]],
    *,
    budget: Budget | None = None,
    most: int = 6,
    repeats: bool = False,
) -> Tuned:
    """Choose proposers and an aggregator.

    Every other question chooses; the rest validates.

    Args:
        models: The pool.
        measure: Asks a panel all questions.
        budget: What an answer may cost.
        most: Proposers of the largest panel that is tried.
        repeats: Whether a model may propose several times, as in Self-MoA (Li et al. 2025); else several models
            propose once each, as in the paper.

    Raises:
        RequestError: If the budget allows nothing.
    """
    budget = budget or Budget()
    known: dict[Panel, Measured] = {}

    async def of(panel: Panel) -> Measured:
        if panel not in known:
            known[panel] = await measure(panel)
        return known[panel]

    everybody = tuple(models)
    alone = {model: await of(((model,), None)) for model in models}
    aggregating = {model: await of((everybody, model)) for model in models}
    chief = max(models, key=lambda model: _choosing(aggregating[model]))
    proposing = {model: await of(((model, model), chief)) for model in models}
    roles = {
        model: Roles(_choosing(alone[model]), _choosing(proposing[model]), _choosing(aggregating[model]))
        for model in models
    }
    allowed = [model for model in models if budget.allows(alone[model])]
    if not allowed:
        raise RequestError("the budget allows not even one model alone", hint="allow more tokens or seconds")
    single = max(allowed, key=lambda model: _choosing(alone[model]))
    steps = [_step(((single,), None), alone[single])]
    proposers: tuple[str, ...] = ()
    while len(proposers) < most:
        tried = [((*proposers, model), chief) for model in models if repeats or model not in proposers]
        found = [(panel, measured) for panel in tried if budget.allows(measured := await of(_sorted(panel, models)))]
        if not found:
            break
        (proposers, _), measured = max(found, key=lambda each: (_choosing(each[1]), roles[each[0][0][-1]].proposer))
        steps.append(_step((proposers, chief), measured))
    best = max(steps, key=lambda step: (step.held_out, -step.tokens))
    gain = None
    if best is not steps[0]:
        measured = known[_sorted(best.panel, models)]
        gain = bootstrap((measured.scores - alone[single].scores)[1::2])
    return Tuned(best.panel, roles, steps, gain)


def _sorted(panel: Panel, models: Sequence[str]) -> Panel:
    """The same panel, its proposers in the pool's order: in which order they were chosen does not matter."""
    proposers, chief = panel
    return tuple(sorted(proposers, key=models.index)), chief


def _choosing(measured: Measured) -> float:
    return float(measured.scores[::2].mean())


def _step(panel: Panel, measured: Measured) -> Step:
    rest = measured.scores[1::2] if len(measured.scores) > 1 else measured.scores
    return Step(panel, _choosing(measured), float(np.mean(rest)), measured.tokens, measured.total_s)


def spec_of(pool: dict[str, Any], panel: Panel) -> dict[str, Any]:
    """The graph of a panel, as the user's YAML with other layers.

    Args:
        pool: The pool's YAML, with its `${SECRETS}` as they were written.
        panel: What was chosen.
    """
    proposers, chief = panel
    agents = {name: dict(pool["agents"][name]) for name in dict.fromkeys(proposers)}
    for name, times in Counter(proposers).items():
        agents[name].pop("samples", None)
        if times > 1:
            agents[name]["samples"] = times
    # One model is passed through by a vote of one: as an aggregator it would be asked twice.
    aggregator: Any = {"vote": {"extract": "last_line"}}
    if chief is not None:
        aggregator = f"{chief[:50]}-aggregator"
        agents[aggregator] = {key: value for key, value in pool["agents"][chief].items() if key != "samples"}
    asked = [each for agent in agents.values() for each in (agent["engine"], *agent.get("fallbacks", []))]
    used = {name for name in asked if isinstance(name, str)}
    kept = {key: value for key, value in pool.items() if key not in ("layers", "nodes", "gate")}
    return kept | {
        "engines": {name: engine for name, engine in pool.get("engines", {}).items() if name in used},
        "agents": agents,
        "layers": [list(dict.fromkeys(proposers))],
        "aggregator": aggregator,
    }
