"""What a runner remembers of its engines between requests: are they well, how fast are they, what may be repeated.

Times are passed in, in seconds of any one clock.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from math import ceil

from moa_ray.errors import EngineError, EngineOverloaded

FAILURES_TO_OPEN = 5
"""As Envoy's outlier detection has it: so many failures without a success between, and calls stop."""
_FIRST_REST_S = 1.0
_LONGEST_REST_S = 30.0
_TIMES_KEPT = 500
_TIMES_NEEDED = 20
"""Fewer times to first token make no percentile to act on."""
RETRY_SHARE = 0.2
_RETRIES_SAVED = 100.0
_HEDGES_SAVED = 5.0


@dataclass(slots=True)
class Budget:
    """Repeated calls that the ordinary ones have paid for, so that a sick engine is not buried in repetitions.

    Args:
        most: The most that can be saved up, which is also there at the start.
    """

    most: float
    balance: float = field(init=False)

    def __post_init__(self) -> None:
        self.balance = self.most

    def earn(self, share: float) -> None:
        """An ordinary call was made; it pays for `share` of a repetition."""
        self.balance = min(self.most, self.balance + share)

    def spend(self) -> bool:
        """Take one repetition, if there is one."""
        if self.balance < 1:
            return False
        self.balance -= 1
        return True


@dataclass(slots=True)
class EngineHealth:
    """One engine, as one runner has seen it.

    The breaker is open for a while after `FAILURES_TO_OPEN` failures in a row; then one call is let through as a
    probe, which closes it or keeps it open for twice as long. Failures of calls that were in flight together, as
    when a replica dies, count as one.

    Attributes:
        retries: Budget of retries.
        hedges: Budget of hedges.
    """

    retries: Budget = field(default_factory=lambda: Budget(_RETRIES_SAVED))
    hedges: Budget = field(default_factory=lambda: Budget(_HEDGES_SAVED))
    _ttft_s: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES_KEPT))
    _failures: int = 0
    _failed_at: float | None = None
    _open_until: float | None = None
    _rest_s: float = _FIRST_REST_S
    _probing: bool = False

    @property
    def is_open(self) -> bool:
        """Whether calls are held back, but for a probe."""
        return self._open_until is not None

    def admit(self, now: float) -> bool:
        """Whether a call may be made; one that may must be ended by one of the methods below."""
        if self._open_until is None:
            return True
        if self._probing or now < self._open_until:
            return False
        self._probing = True
        return True

    def succeeded(self, ttft_s: float) -> None:
        """A call was answered, its first token after `ttft_s`."""
        self._ttft_s.append(ttft_s)
        self._failures, self._open_until, self._rest_s, self._probing = 0, None, _FIRST_REST_S, False

    def failed(self, error: EngineError, started: float, now: float) -> None:
        """A call that began at `started` failed."""
        if not error.retryable or isinstance(error, EngineOverloaded):
            return self.released()  # the engine is well: it refused this call, or says itself when to come back
        if self._probing:
            self._probing = False
            self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)
            self._open_until = now + self._rest_s
        elif self._failed_at is None or started >= self._failed_at:
            self._failures += 1
            if self._failures >= FAILURES_TO_OPEN:
                self._open_until = now + self._rest_s
        self._failed_at = now

    def released(self) -> None:
        """A call ended without telling anything of the engine."""
        self._probing = False

    def ttft_percentile(self, percent: int) -> float | None:
        """Of the recent times to first token, in seconds; None where there are too few."""
        if len(self._ttft_s) < _TIMES_NEEDED:
            return None
        return sorted(self._ttft_s)[ceil(len(self._ttft_s) * percent / 100) - 1]


class Health(defaultdict[str, EngineHealth]):
    """The health of every engine, by name."""

    def __init__(self) -> None:
        super().__init__(EngineHealth)
