"""What the engines were doing of late: a consumer of the events of many runs."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from statistics import quantiles

from moa_ray.runtime.events import AgentCancelled, AgentFailed, AgentFinished, AgentPaused, AgentStarted, Event

WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One engine over the last `WINDOW_S` seconds, as one router saw it.

    Args:
        ongoing: Calls in flight.
        seconds: Duration of each call that finished.
        failed: Calls that failed.
    """

    ongoing: int = 0
    seconds: tuple[float, ...] = field(default=(), repr=False)
    failed: int = 0

    def __add__(self, other: EngineLoad) -> EngineLoad:
        return EngineLoad(self.ongoing + other.ongoing, self.seconds + other.seconds, self.failed + other.failed)

    @property
    def calls_per_s(self) -> float:
        """Finished calls a second."""
        return len(self.seconds) / WINDOW_S

    def percentile(self, percent: int) -> float | None:
        """Duration of a call in seconds; None where none finished."""
        if len(self.seconds) < 2:
            return self.seconds[0] if self.seconds else None
        return quantiles(self.seconds, n=100, method="inclusive")[percent - 1]


class Meter:
    """Keeps what `EngineLoad` tells, for every engine."""

    def __init__(self) -> None:
        # run -> (call, attempt) -> engine
        self._ongoing: defaultdict[str, dict[tuple[str, int], str]] = defaultdict(dict)
        self._ended: deque[tuple[float, str, float | None]] = deque()

    def add(self, event: Event) -> None:
        """Book one event."""
        match event:
            case AgentStarted():
                self._ongoing[event.run][event.call, event.attempt] = event.engine
            case AgentPaused() | AgentFinished() | AgentFailed() | AgentCancelled():
                self._ongoing[event.run].pop((event.call, event.attempt), None)
                if not isinstance(event, AgentCancelled):
                    seconds = None if isinstance(event, AgentFailed) else event.seconds
                    self._ended.append((time.monotonic(), event.engine, seconds))
                    self._forget()
            case _:
                pass

    def end(self, run: str) -> None:
        """There will be no more events of `run`; one that was given up has told no end of its calls."""
        self._ongoing.pop(run, None)

    def _forget(self) -> None:
        while self._ended and self._ended[0][0] < time.monotonic() - WINDOW_S:
            self._ended.popleft()

    def load(self) -> dict[str, EngineLoad]:
        """Every engine that was called."""
        self._forget()
        ongoing = Counter(engine for calls in self._ongoing.values() for engine in calls.values())
        return {
            engine: EngineLoad(
                ongoing[engine],
                tuple(seconds for _, name, seconds in self._ended if name == engine and seconds is not None),
                sum(name == engine and seconds is None for _, name, seconds in self._ended),
            )
            for engine in {*ongoing, *(name for _, name, _ in self._ended)}
        }
