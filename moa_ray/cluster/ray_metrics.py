"""Ray's own metrics: what a replica tells, the metrics agent of its node shows, with `ray_` before the name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.serve import metrics

from moa_ray.runtime.metrics import Add


class RayMetrics:
    """A `Keeper` in a Serve replica; Serve adds `application`, `deployment` and `replica` to the labels."""

    def counter(self, name: str, help: str, labels: Sequence[str]) -> Add:
        """Something that only grows."""
        counter = metrics.Counter(name, description=help, tag_keys=tuple(labels))

        def add(value: float, *values: str) -> None:
            if value:  # Ray takes nothing for a mistake
                counter.inc(value, tags=dict(zip(labels, values, strict=True)))

        return add

    def histogram(self, name: str, help: str, labels: Sequence[str], buckets: Sequence[float]) -> Add:
        """How values are spread."""
        histogram: Any = metrics.Histogram(name, description=help, boundaries=list(buckets), tag_keys=tuple(labels))

        def add(value: float, *values: str) -> None:
            histogram.observe(value, tags=dict(zip(labels, values, strict=True)))

        return add
