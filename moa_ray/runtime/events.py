"""What happens in one run, as it happens. Every front end is a consumer of this one stream.

The JSON form (`to_json`, one object a line in `moa-ray run --json`) is public; `VERSION` grows when a
field changes its meaning or goes away, not when one is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

from moa_ray.engines.protocol import FinishReason, Usage

VERSION = 1


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events.

    Args:
        run: The run's id.
        t: Seconds since the run started, monotonic.
    """

    name: ClassVar[str]

    run: str
    t: float


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run began; `calls` engine calls are planned, to `engines`: the `kind` and `model` of each by its name.

    `prices` are those of engines that have one, in dollars a million tokens: `prompt`, `cached`, `completion`.
    """

    name = "run.started"
    graph: str
    calls: int
    version: int = VERSION
    engines: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    prices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GateDecided(Event):
    """The gate said who answers.

    Args:
        kind: The gate's kind.
        weights: How much each agent counts, as the gate has it; empty where everybody answers for want of a gate.
        layers: Who answers, layer by layer; none where no panel is asked.
        calls: Engine calls that are now planned.
        seconds: How long it took.
        note: How it came about, "" for nothing to say.
        failed: Why the gate was left out, "" where it was not.
        alone: The agent that answers without a panel, "" for none.
    """

    name = "gate.decided"
    kind: str
    weights: Mapping[str, float]
    layers: tuple[tuple[str, ...], ...]
    calls: int
    seconds: float
    note: str = ""
    failed: str = ""
    alone: str = ""

    @property
    def shares(self) -> dict[str, float]:
        """The weights of those who answer, made to sum to 1, G(x) of the papers; nothing where the gate answered."""
        if self.alone:
            return {self.alone: 1.0}
        chosen = dict.fromkeys(agent for layer in self.layers for agent in layer)
        total = sum(self.weights.get(agent, 0.0) for agent in chosen)
        if not total:
            return {agent: 1 / len(chosen) for agent in chosen}
        return {agent: self.weights.get(agent, 0.0) / total for agent in chosen}


@dataclass(frozen=True, slots=True)
class LayerStarted(Event):
    """The first agent of a layer is about to start. Layers count from 1; the aggregator's is the last."""

    name = "layer.started"
    layer: int
    agents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AgentEvent(Event):
    """Base of what happens to one call of one agent.

    Args:
        call: Id of the call in the graph, such as `1/skeptic` or `2/skeptic#3`.
        agent: Name of the agent.
        engine: Name of its engine.
        layer: Layer of the call, from 1.
        attempt: Number of the attempt, from 1.
    """

    call: str
    agent: str
    engine: str
    layer: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """What a reader should know of how this run goes; told once."""

    name = "run.notice"
    text: str


@dataclass(frozen=True, slots=True)
class AgentWarmed(AgentEvent):
    """A part of the prompt of a call to come was prefilled ahead, in `seconds` seconds, at the cost of `usage`."""

    name = "agent.warmed"
    seconds: float
    usage: Usage


@dataclass(frozen=True, slots=True)
class AgentStarted(AgentEvent):
    """The call was sent to the engine.

    Args:
        proposals: How many it was shown.
        trimmed: What had to be cut from its prompt to fit the window.
        continued: Characters of the answer that are there already, and that this attempt continues.
        hedge: Whether it races the attempt before it, which is slow to begin.
        stage: In a staircase a text is written in stages, each with attempts of its own; from 1.
    """

    name = "agent.started"
    proposals: int
    trimmed: tuple[str, ...] = ()
    continued: int = 0
    hedge: bool = False
    stage: int = 1


@dataclass(frozen=True, slots=True)
class AgentDelta(AgentEvent):
    """More text of a proposal."""

    name = "agent.delta"
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class AgentPaused(AgentEvent):
    """A stage of the text is written; the next one begins when there is more of the proposals to be seen.

    `usage` and all times are this attempt's.
    """

    name = "agent.paused"
    usage: Usage
    seconds: float
    ttft_s: float
    prefill_s: float | None = None


@dataclass(frozen=True, slots=True)
class AgentFinished(AgentEvent):
    """The call is complete; `seconds` is from this attempt's start, `ttft_s` to its first token.

    `text` is the whole answer, `usage` this attempt's. `prefill_s`, where the engine knows it, is the part of `ttft_s`
    in which the prompt was read; before it the call waited. `itl_s` is the mean time between two tokens, where it could
    be seen.
    """

    name = "agent.finished"
    text: str
    usage: Usage
    seconds: float
    ttft_s: float
    finish_reason: FinishReason
    prefill_s: float | None = None
    itl_s: float | None = None


@dataclass(frozen=True, slots=True)
class AgentFailed(AgentEvent):
    """An attempt failed; with `will_retry` another follows, or runs already."""

    name = "agent.failed"
    error: str
    message: str
    will_retry: bool
    seconds: float
    usage: Usage


@dataclass(frozen=True, slots=True)
class AgentSkipped(AgentEvent):
    """The call is not made: what it builds on agrees already, and the answer of call `source` stands for its own."""

    name = "agent.skipped"
    source: str


@dataclass(frozen=True, slots=True)
class AgentCancelled(AgentEvent):
    """The call was cut off because nobody needs it any more; `usage` is what was seen of it until then."""

    name = "agent.cancelled"
    reason: str
    seconds: float
    usage: Usage


@dataclass(frozen=True, slots=True)
class AnswerDelta(Event):
    """More text of the final answer, or of calls to the caller's tools, as OpenAI streams them."""

    name = "answer.delta"
    text: str
    tool_calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """The last event of every run.

    Args:
        text: The whole answer, or what there was of it.
        usage: Sum over all calls and attempts.
        ttft_s: Seconds to the first token of the answer; None where there was none.
        source: Id of the call whose text the answer is.
        note: What a reader should know of how the answer came about, "" for nothing.
        error: Class of the error that ended the run, "" for success.
        message: What went wrong.
        dollars: What the calls to engines with a price cost; None where no engine has one.
    """

    name = "run.finished"
    text: str
    usage: Usage
    ttft_s: float | None
    source: str = ""
    finish_reason: FinishReason | None = None
    note: str = ""
    error: str = ""
    message: str = ""
    dollars: float | None = None


def to_json(event: Event) -> dict[str, Any]:
    """The public JSON form: `event` (the name) and the event's fields, times rounded to microseconds."""
    return {"event": event.name, **_fields(event)}


def from_json(told: Mapping[str, Any]) -> Event:
    """The event that `to_json` told; fields of later versions are passed over.

    Raises:
        ValueError: If there is no such event, or a field that it needs is missing.
    """
    kind: Any = _BY_NAME.get(told.get("event", ""))
    if kind is None:
        raise ValueError(f"there is no event {told.get('event')!r}")
    values = {key: _read(key, told[key]) for key in _keys(kind) if key in told}
    try:
        event: Event = kind(**values)
    except TypeError as error:
        raise ValueError(f"{kind.name}: {error}") from None
    return event


def _read(key: str, value: Any) -> Any:
    if key == "usage":
        return Usage(**value)
    return _tuples(value) if isinstance(value, list) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _kinds(base: type[Event]) -> Iterator[type[Event]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


_BY_NAME = {kind.name: kind for kind in _kinds(Event) if hasattr(kind, "name")}


def _fields(value: Event | Usage) -> dict[str, Any]:
    kind: Any = type(value)
    return {key: _plain(getattr(value, key)) for key in _keys(kind)}


@cache
def _keys(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


def _plain(value: Any) -> Any:
    match value:
        case float():
            return round(value, 6)
        case tuple():
            return [_plain(item) for item in value]
        case Mapping():
            return {key: _plain(item) for key, item in value.items()}
        case Usage():
            return _fields(value)
        case _:
            return value
