"""Aggregators that a package brings: they take a proposal or write an answer out of them, without a model.

A package brings its own by the entry point group `moa_ray.aggregators`: a subclass of `Aggregator`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from moa_ray.errors import MoARayError
from moa_ray.graph.plugins import Plugins
from moa_ray.graph.spec import PluginAggregator


class Aggregator(BaseModel, ABC):
    """What a plug-in registers. Its fields are the kind's own YAML keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def aggregate(self, proposals: Sequence[str]) -> int | str:
        """The index of the proposal that is the answer, or the text of a new one.

        Args:
            proposals: At least one, in the graph's order.
        """


KINDS: Plugins[type[Aggregator]] = Plugins("moa_ray.aggregators", "aggregator kind", {})


def aggregate(spec: PluginAggregator, proposals: Sequence[str]) -> int | str:
    """What the aggregator of a checked graph makes of the proposals: the index of one, or a text.

    Raises:
        MoARayError: If it fails, or returns neither.
    """
    try:
        made = KINDS.find(spec.kind).model_validate(spec.options).aggregate(proposals)
    except Exception as error:  # a plug-in may raise anything
        raise MoARayError(f"the aggregator {spec.kind} failed: {type(error).__name__}: {error}") from error
    if isinstance(made, str) or (type(made) is int and 0 <= made < len(proposals)):
        return made
    message = f"the aggregator {spec.kind} returned {made!r}: neither a text nor the index of a proposal"
    raise MoARayError(f"{message}, of which there are {len(proposals)}")
