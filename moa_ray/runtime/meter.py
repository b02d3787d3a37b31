"""What the engines were doing of late: a consumer of the events of many runs."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from statistics import fmean, pstdev, quantiles

from moa_ray.runtime.events import (
    AgentCancelled,
    AgentFailed,
    AgentFinished,
    AgentPaused,
    AgentStarted,
    Event,
    GateDecided,
)

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

    @property
    def mean_ongoing(self) -> float:
        """Calls in flight on average: the rate at which they come, times how long each takes (Little's law)."""
        return sum(self.seconds) / WINDOW_S

    def percentile(self, percent: int) -> float | None:
        """Duration of a call in seconds; None where none finished."""
        if len(self.seconds) < 2:
            return self.seconds[0] if self.seconds else None
        return quantiles(self.seconds, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True, slots=True)
class GateLoad:
    """How a gate spread the requests of the last `WINDOW_S` seconds over its agents, as one router saw it.

    Args:
        requests: Requests that it decided.
        failed: Requests that went without it.
        importance: Sum of the weights that each agent got (Shazeer et al. 2017, eq. 6).
        load: Requests that each agent got.
    """

    requests: int = 0
    failed: int = 0
    importance: Mapping[str, float] = field(default_factory=dict)
    load: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: GateLoad) -> GateLoad:
        names = dict.fromkeys([*self.load, *other.load])
        return GateLoad(
            self.requests + other.requests,
            self.failed + other.failed,
            {name: self.importance.get(name, 0.0) + other.importance.get(name, 0.0) for name in names},
            {name: self.load.get(name, 0) + other.load.get(name, 0) for name in names},
        )

    def among(self, agents: Iterable[str]) -> GateLoad:
        """The same with every one of `agents`, also those that got nothing."""
        return self + GateLoad(load=dict.fromkeys(agents, 0))

    @property
    def cv_importance(self) -> float:
        """Coefficient of variation of the importance (table 6)."""
        return _cv(self.importance.values())

    @property
    def cv_load(self) -> float:
        """Coefficient of variation of the load (table 6)."""
        return _cv(self.load.values())

    @property
    def max_over_mean_load(self) -> float:
        """max(load) / mean(load) (table 6); 1 is perfect balance, 0 where there was no load."""
        loads = list(self.load.values())
        return max(loads) / fmean(loads) if any(loads) else 0.0


def _cv(values: Iterable[float]) -> float:
    numbers = list(values)
    return pstdev(numbers) / fmean(numbers) if any(numbers) else 0.0


class Meter:
    """Keeps what `EngineLoad` tells, for every engine, and `GateLoad`, for the gate."""

    def __init__(self) -> None:
        self._decided: deque[tuple[float, GateLoad]] = deque()
        # run -> (call, attempt) -> engine
        self._ongoing: defaultdict[str, dict[tuple[str, int], str]] = defaultdict(dict)
        self._ended: deque[tuple[float, str, float | None]] = deque()

    def add(self, event: Event) -> None:
        """Book one event."""
        match event:
            case GateDecided():
                shares = {} if event.failed else event.shares
                load = GateLoad(int(not event.failed), int(bool(event.failed)), shares, dict.fromkeys(shares, 1))
                self._decided.append((time.monotonic(), load))
                self._forget()
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
        since = time.monotonic() - WINDOW_S
        while self._ended and self._ended[0][0] < since:
            self._ended.popleft()
        while self._decided and self._decided[0][0] < since:
            self._decided.popleft()

    def gate(self) -> GateLoad:
        """What the gate did."""
        self._forget()
        return reduce(add, (load for _, load in self._decided), GateLoad())

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
