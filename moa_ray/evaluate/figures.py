"""What a load came to, in the words of `vllm bench serve`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa_ray.errors import RequestError
from moa_ray.evaluate.load import Sample
from moa_ray.graph.source import which

_TIMES = ("ttft", "tpot", "itl", "e2el")
_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Service level objectives of one request: the longest times that count as good, in milliseconds.

    Args:
        most_ms: By `ttft`, `tpot` or `e2el`.
    """

    most_ms: Mapping[str, float]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Objectives:
        """From `ttft:500`, `e2el:3000`.

        Raises:
            RequestError: For what is no objective.
        """
        most: dict[str, float] = {}
        for text in texts:
            name, colon, number = text.partition(":")
            if name not in ("ttft", "tpot", "e2el"):
                hint = which(name, ("ttft", "tpot", "e2el"))
                raise RequestError(f"--goodput {text!r}: nothing is called {name!r}", hint=hint)
            try:
                most[name] = float(number)
            except ValueError:
                most[name] = -1.0
            if not colon or not most[name] > 0:
                raise RequestError(f"--goodput {text!r}: write {name}:MILLISECONDS")
        return cls(most)

    def met(self, sample: Sample) -> bool:
        """Whether a request succeeded, and in time. One of fewer than two tokens has no time per output token."""
        seconds = {"ttft": sample.ttft_s, "tpot": sample.tpot_s or 0.0, "e2el": sample.e2el_s}
        return not sample.error and all(
            (took := seconds[name]) is not None and took * 1e3 <= most for name, most in self.most_ms.items()
        )


@dataclass(frozen=True, slots=True)
class Figures:
    """What a load came to.

    Args:
        samples: Its requests.
        duration_s: Seconds from its start to the last answer's end.
        objectives: What goodput is; None where nobody asks.
    """

    samples: Sequence[Sample]
    duration_s: float
    objectives: Objectives | None = None

    def to_json(self) -> dict[str, Any]:
        """All figures, named as `vllm bench serve` names them in its result file; times are in milliseconds."""
        good = [sample for sample in self.samples if not sample.error]
        prompt = sum(sample.usage.prompt_tokens for sample in good)
        output = sum(sample.usage.completion_tokens for sample in good)
        met = sum(map(self.objectives.met, self.samples)) if self.objectives else None
        seconds = max(self.duration_s, 1e-9)  # requests that are refused at once take no time
        figures: dict[str, Any] = {
            "duration": self.duration_s,
            "completed": len(good),
            "failed": len(self.samples) - len(good),
            "total_input_tokens": prompt,
            "total_output_tokens": output,
            "request_throughput": len(good) / seconds,
            "request_goodput": None if met is None else met / seconds,
            "output_throughput": output / seconds,
            "total_token_throughput": (prompt + output) / seconds,
        }
        for name in _TIMES:
            figures |= _spread(name, [seconds * 1e3 for sample in good for seconds in _seconds(sample, name)])
        return figures | {"errors": dict(self.errors), "max_sent_late_ms": self.sent_late_ms}

    @property
    def errors(self) -> Counter[str]:
        """Requests that failed, by kind."""
        return Counter(sample.error for sample in self.samples if sample.error)

    @property
    def sent_late_ms(self) -> float:
        """The longest that a request was sent late: then this process was too slow for the load, not the endpoint."""
        return max((sample.sent_late_s for sample in self.samples), default=0.0) * 1e3


def _seconds(sample: Sample, name: str) -> Iterator[float]:
    match name:
        case "itl":
            yield from sample.itl_s
        case "ttft" if sample.ttft_s is not None:
            yield sample.ttft_s
        case "tpot" if sample.tpot_s is not None:
            yield sample.tpot_s
        case "e2el":
            yield sample.e2el_s
        case _:
            return


def _spread(name: str, times_ms: Sequence[float]) -> dict[str, float | None]:
    figures: dict[str, float | None] = {
        f"mean_{name}_ms": statistics.fmean(times_ms) if times_ms else None,
        f"median_{name}_ms": percentile(times_ms, 50),
        f"std_{name}_ms": statistics.pstdev(times_ms) if times_ms else None,
    }
    return figures | {f"p{percent}_{name}_ms": percentile(times_ms, percent) for percent in _PERCENTILES}


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The value below which so many percent lie, between two where it falls between; None of nothing."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
