"""What the HTTP edge asks of whatever runs the graphs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from moa_ray.gates.feedback import Answered, Judgement
from moa_ray.graph import Graph, Message
from moa_ray.runtime import Event, RunOptions


class Backend(Protocol):
    """Graphs by name, and runs as streams of events."""

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs."""
        ...

    async def graph(self, name: str) -> Graph:
        """The graph `name` as it is now."""
        ...

    def stream(self, graph: str, messages: list[Message], options: RunOptions) -> AsyncGenerator[list[Event], None]:
        """Run one request; the last event is `run.finished`. Closing the generator cancels every engine call.

        Raises:
            MoARayError: After the last event, if the run failed; before the first, if it was refused.
        """
        ...

    def remember(self, answered: Answered) -> None:
        """Keep an answer, so that it can be judged; not waited for."""
        ...

    async def judge(self, judgement: Judgement) -> None:
        """Write down what is said of an answer.

        Raises:
            RequestError: If it is not among the latest.
            MoARayError: If it cannot be written.
        """
        ...

    async def unready(self) -> list[str]:
        """Names of the graphs that cannot answer now."""
        ...
