"""What each call of a run did when: a consumer of events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from moa_ray.runtime.events import (
    AgentCancelled,
    AgentEvent,
    AgentFailed,
    AgentFinished,
    AgentPaused,
    AgentWarmed,
    Event,
    RunFinished,
)

Kind = Literal["warm-up", "queue", "prefill", "decode", "lost"]
KINDS: tuple[Kind, ...] = ("warm-up", "queue", "prefill", "decode", "lost")


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that a call did.

    Args:
        kind: `warm-up` (its prompt was prefilled ahead), `queue` (the engine had no room), `prefill` (its prompt was
            read; the wait before it, too, where the engine does not tell them apart), `decode` (text was written),
            `lost` (an attempt that failed or was cut off).
        start: Seconds from the run's start.
        end: The same.
    """

    kind: Kind
    start: float
    end: float


@dataclass(slots=True)
class Row:
    """One call.

    Args:
        call: Its id in the graph.
        engine: Name of the engine that was asked last.
        spans: In the order in which they ended.
    """

    call: str
    engine: str
    spans: list[Span] = field(default_factory=list)


class Timeline:
    """A Gantt chart of one run, as data.

    Args:
        events: Events of the run so far.

    Attributes:
        ttft_s: Seconds to the first token of the answer; None where there is none.
        total_s: Seconds that the run took so far.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._rows: dict[str, Row] = {}
        self.ttft_s: float | None = None
        self.total_s = 0.0
        for event in events:
            self.add(event)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The calls in the order in which they began; warm-ups do not count where there is more."""
        return tuple(sorted(self._rows.values(), key=_began))

    def add(self, event: Event) -> None:
        """Book one event."""
        self.total_s = max(self.total_s, event.t)
        match event:
            case AgentWarmed():
                self._book(event, Span("warm-up", event.t - event.seconds, event.t))
            case AgentPaused() | AgentFinished():
                start = event.t - event.seconds
                first = start + min(event.ttft_s, event.seconds)
                read = start if event.prefill_s is None else max(start, first - event.prefill_s)
                spans = Span("queue", start, read), Span("prefill", read, first), Span("decode", first, event.t)
                self._book(event, *(span for span in spans if span.end > span.start))
            case AgentFailed() | AgentCancelled():
                self._book(event, Span("lost", event.t - event.seconds, event.t))
            case RunFinished():
                self.ttft_s = event.ttft_s
            case _:
                pass

    def _book(self, event: AgentEvent, *spans: Span) -> None:
        row = self._rows.setdefault(event.call, Row(event.call, event.engine))
        row.engine = event.engine
        row.spans += spans


def _began(row: Row) -> tuple[bool, float]:
    own = [span.start for span in row.spans if span.kind != "warm-up"]
    return not own, min(own or [span.start for span in row.spans])
