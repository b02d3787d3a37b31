"""A gate with a model as a Ray Serve deployment, and its other end: the `Gate` that the router sees.

In an actor of its own it embeds what all routers ask at once in one batch, and its work slows no router down.
"""

from __future__ import annotations

from typing import Any

from ray.serve.handle import DeploymentHandle

from moa_ray.cluster.calls import Method, reading
from moa_ray.gates import Choice, Gate, Question, registry
from moa_ray.graph import Graph, Message


class GateReplica:
    """The deployment class: one gate, in an actor of its own. Ready when its model is loaded."""

    def __init__(self, graph: Graph) -> None:
        self._gate = registry.create(graph)

    async def choose(self, messages: tuple[Message, ...], agents: tuple[str, ...]) -> Choice:
        """Weigh the agents for one question."""
        return await self._gate.choose(Question(messages, agents))

    async def __del__(self) -> None:  # Serve awaits it when the replica is drained
        await self._gate.close()


class HandleGate:
    """A `Gate` that lives in another deployment.

    Args:
        handle: Handle of it.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._choose = Method(handle, "choose")

    async def choose(self, question: Question) -> Choice:
        """Ask it; one that is gone raises, or takes longer than the run waits."""
        response: Any = self._choose(question.messages, question.agents)
        with reading(response):
            choice: Choice = await response
            return choice

    async def close(self) -> None:
        """The deployment outlives its handles."""


def local(graph: Graph, handle: DeploymentHandle[Any] | None) -> tuple[Gate, float] | None:
    """The gate of `graph` for a runner, and the seconds that it may take; None where everybody is asked.

    Args:
        graph: The graph.
        handle: Handle of the gate's deployment, where it has one.
    """
    return registry.for_runner(graph, HandleGate(handle) if handle is not None else None)
