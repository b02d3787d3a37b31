"""`/v1/runs`: every event of a run, as it happens, for those who want to see how an answer comes about."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

from moa_ray.graph import Call, Graph
from moa_ray.runtime import to_json
from moa_ray.server.runs import Batch, Choice


class Live:
    """One request's run as a stream of its events.

    Args:
        judged: Whether feedback on it is kept.
    """

    drafts = True
    drafts_every_s = 0.1

    def __init__(self, *, judged: bool) -> None:
        self.choices = [Choice()]
        self.id = f"run_{uuid4().hex}"
        self._judged = judged

    async def chunks(self, batches: AsyncGenerator[Batch | None, None]) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The events in their public JSON form, after one that tells the id which feedback is given by."""
        begun = False
        async for batch in batches:
            if not begun:  # what fails before has an HTTP status of its own
                yield {"event": "request.started", "id": self.id, "feedback": self._judged}
                begun = True
            if batch is None:
                yield None
                continue
            for event in batch[1]:
                yield to_json(event)


def picture(graph: Graph) -> dict[str, Any]:
    """A graph's shape: what is asked of whom, and who sees whose answer; neither prompts nor secrets."""

    def told(call: Call) -> dict[str, Any]:
        return {"id": call.id, "agent": call.agent, "layer": call.layer, "inputs": list(call.inputs)}

    return {
        "name": graph.spec.name,
        "description": graph.spec.description,
        "calls": [told(call) for call in graph.calls],
        "answer": told(graph.answer) if graph.answer else None,
        "engines": {name: {"kind": spec.kind, "model": spec.model} for name, spec in graph.engines.items()},
    }
