"""The account of a run: every call, every attempt, every token, in the order in which the calls started."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moa_ray.engines.protocol import Usage
from moa_ray.runtime.events import (
    AgentCancelled,
    AgentEvent,
    AgentFailed,
    AgentFinished,
    AgentPaused,
    AgentStarted,
    AgentWarmed,
    Event,
    GateDecided,
    RunFinished,
    RunStarted,
    to_json,
)

State = Literal["running", "finished", "failed", "cancelled"]


@dataclass(slots=True)
class CallRecord:
    """One line of the ledger.

    Args:
        call: Id of the call in the graph.
        agent: Name of the agent.
        engine: Name of the engine that was asked last.
        layer: Layer of the call, from 1.
        state: How it stands.
        stages: Stages in which the text was written.
        attempts: Times that it, or a stage of it, was sent to an engine.
        retries: Those that followed a failure.
        hedges: Those that raced another one.
        cancelled: Those that were cut off.
        usage: Tokens of all attempts.
        warmed: Tokens of prefilling its prompt ahead.
        text: The answer, once finished.
        started_s: Seconds from the run's start to the first attempt.
        seconds: From the first attempt's start to the end of the last, retries and pauses included.
        ttft_s: Seconds from the successful attempt's start to its first token; the first stage's.
        itl_s: Mean seconds between the tokens of the successful attempt; of the last stage. None where it is not known.
        error: Why the last attempt failed, "" where it did not.
        dollars: What `usage` and `warmed` cost; None where no engine that was asked has a price.
    """

    call: str
    agent: str
    engine: str
    layer: int
    started_s: float
    state: State = "running"
    stages: int = 1
    attempts: int = 0
    retries: int = 0
    hedges: int = 0
    cancelled: int = 0
    usage: Usage = field(default_factory=Usage)
    warmed: Usage = field(default_factory=Usage)
    text: str = ""
    seconds: float = 0.0
    ttft_s: float | None = None
    itl_s: float | None = None
    error: str = ""
    dollars: float | None = None


@dataclass(frozen=True, slots=True)
class Spender:
    """Who used tokens: an agent in a layer, on an engine."""

    layer: int
    agent: str
    engine: str


class Ledger:
    """A consumer of events that keeps one `CallRecord` a call.

    Attributes:
        graph: Name of the graph, "" before the run started.
        gate: What the gate said; None without one.
        used: Tokens of all attempts, and of prefilling ahead, by who used them.
        spent: The same in dollars, of engines that have a price.
        repeats: How many `retries` followed a failure of theirs, `hedges` raced an attempt, and were `cancelled`.
        end: The run's last event, once it came.
    """

    def __init__(self) -> None:
        self.graph = ""
        self.gate: GateDecided | None = None
        self.end: RunFinished | None = None
        self.used: defaultdict[Spender, Usage] = defaultdict(Usage)
        self.spent: defaultdict[Spender, float] = defaultdict(float)
        self.repeats: Counter[tuple[Spender, str]] = Counter()
        self._prices: Mapping[str, Mapping[str, float]] = {}
        self._dollars: dict[str, float] = {}  # by call
        self._records: dict[str, CallRecord] = {}
        self._flying: set[tuple[str, int]] = set()
        self._warmed: defaultdict[tuple[str, str], Usage] = defaultdict(Usage)  # by call and agent

    @property
    def records(self) -> tuple[CallRecord, ...]:
        """All calls, in the order in which they started."""
        return tuple(self._records.values())

    @property
    def usage(self) -> Usage:
        """Tokens of all calls and attempts, and of prefilling ahead."""
        return sum(self.used.values(), Usage())

    @property
    def dollars(self) -> float | None:
        """What they cost on engines that have a price; None where none of the run has."""
        return sum(self.spent.values()) if self._prices else None

    def add(self, event: Event) -> None:
        """Book one event; those that are not of an agent are passed over."""
        match event:
            case RunStarted():
                self.graph, self._prices = event.graph, event.prices
            case RunFinished():
                self.end = event
            case GateDecided():
                self.gate = event
            case AgentWarmed():  # before the call itself; its record begins with it
                self._warmed[event.call, event.agent] += event.usage
                self._spend(event, event.usage)
            case AgentStarted():
                record = self._record(event)
                record.warmed, record.stages = self._warmed[event.call, event.agent], event.stage
                retries = event.attempt > 1 and not event.hedge
                self.repeats[Spender(event.layer, event.agent, record.engine), "retries"] += retries  # who failed
                self.repeats[Spender(event.layer, event.agent, event.engine), "hedges"] += event.hedge
                record.engine, record.state, record.error = event.engine, "running", ""
                record.dollars = self._dollars.get(event.call)
                record.attempts += 1
                record.hedges += event.hedge
                record.retries += retries
                self._flying.add((event.call, event.attempt))
            case AgentFinished():
                record = self._end(event, event.usage, "finished")
                record.engine, record.text, record.itl_s = event.engine, event.text, event.itl_s
                record.ttft_s = event.ttft_s if record.stages == 1 else record.ttft_s
            case AgentPaused():
                record = self._end(event, event.usage, "running")
                record.ttft_s = event.ttft_s if record.stages == 1 else record.ttft_s
            case AgentFailed():
                self._end(event, event.usage, "failed", event.message)
            case AgentCancelled():
                self._end(event, event.usage, "cancelled", event.reason).cancelled += 1
                self.repeats[Spender(event.layer, event.agent, event.engine), "cancelled"] += 1
            case _:
                pass

    def _record(self, event: AgentEvent) -> CallRecord:
        if event.call not in self._records:
            self._records[event.call] = CallRecord(event.call, event.agent, event.engine, event.layer, event.t)
        return self._records[event.call]

    def _spend(self, event: AgentEvent, usage: Usage) -> None:
        spender = Spender(event.layer, event.agent, event.engine)
        self.used[spender] += usage
        if (price := self._prices.get(event.engine)) is not None:
            fresh = usage.prompt_tokens - usage.cached_tokens
            parts = ((fresh, "prompt"), (usage.cached_tokens, "cached"), (usage.completion_tokens, "completion"))
            dollars = sum(tokens * price[kind] for tokens, kind in parts) / 1e6
            self.spent[spender] += dollars
            self._dollars[event.call] = self._dollars.get(event.call, 0.0) + dollars

    def _end(self, event: AgentEvent, usage: Usage, state: State, error: str = "") -> CallRecord:
        """Book the end of an attempt, which is the end of the call unless another one still runs."""
        record = self._record(event)  # a call may end without having started
        record.usage += usage
        self._spend(event, usage)
        record.dollars = self._dollars.get(event.call)
        record.seconds = event.t - record.started_s
        self._flying.discard((event.call, event.attempt))
        if not any(call == event.call for call, _ in self._flying):
            record.state, record.error = state, error
        return record


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Args:
        text: The answer.
        usage: Tokens of all calls and attempts.
        agents: One record a call, in the order in which they started.
        ttft_s: Seconds to the first token of the answer.
        total_s: Seconds to its last.
        source: Id of the call whose text the answer is.
        note: What a reader should know of how the answer came about, "" for nothing.
        trace: All events of the run.
        dollars: What the calls to engines with a price cost; None where no engine has one.
    """

    text: str
    usage: Usage
    agents: tuple[CallRecord, ...]
    ttft_s: float | None
    total_s: float
    source: str
    note: str
    trace: tuple[Event, ...] = field(repr=False)
    dollars: float | None = None

    @classmethod
    def of(cls, events: Iterable[Event]) -> RunResult:
        """The result that a run's events tell.

        Raises:
            ValueError: If the events do not end with `run.finished`.
        """
        trace = tuple(events)
        end = trace[-1] if trace else None
        if not isinstance(end, RunFinished):
            raise ValueError("the events of a run end with run.finished")
        ledger = Ledger()
        for event in trace:
            ledger.add(event)
        return cls(end.text, ledger.usage, ledger.records, end.ttft_s, end.t, end.source, end.note, trace, end.dollars)

    def to_json(self) -> list[dict[str, Any]]:
        """The trace in its public JSON form."""
        return [to_json(event) for event in self.trace]
