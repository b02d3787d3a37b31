"""A graph as steps that another engine schedules: one call of one agent each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moa_ray.graph import ANSWER, Graph


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the graph. Ask a server for it with `client.run(question, call=step.id, proposals=...)`.

    Args:
        id: The call's id; `answer` is the aggregator, whatever its kind.
        agent: Who is asked; "" where the step only counts votes.
        layer: Layer from 1; the aggregator's is the last.
        inputs: Ids of the steps whose texts it is shown, in the user's order.
        needed: How many of them it takes: the policy's quorum, at most all.
        required: Those of them that it takes in any case.
        retries: Times that the step may be tried again, as the policy says.
        timeout_s: Longest time that it may take, in seconds: the agent's, or the whole request's deadline.
    """

    id: str
    agent: str
    layer: int
    inputs: tuple[str, ...]
    needed: int
    required: frozenset[str]
    retries: int
    timeout_s: float

    def shown(self, texts: Mapping[str, str | None]) -> dict[str, str]:
        """What the step is shown of what the steps before said; None is one that failed."""
        return {name: text for name in self.inputs if (text := texts.get(name)) is not None}


def step_by_step(graph: Graph) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """The graph's steps, each after those whose texts it is shown, the answer last; and what is lost by taking them.

    What is lost are settings that need all calls of a request in one place: an engine that schedules steps passes on
    whole texts, waits for every step before the next, and knows nothing of a gate.
    """
    policy, agents = graph.spec.policy, graph.spec.agents
    of = {call.id: call.agent for call in graph.calls}

    def step(name: str, agent: str, layer: int, inputs: tuple[str, ...]) -> Step:
        required = frozenset(each for each in inputs if agents[of[each]].required)
        own_s = agents[agent].timeout_s if agent else None
        timeout_s = min(own_s or policy.deadline_s, policy.deadline_s)
        return Step(name, agent, layer, inputs, min(policy.quorum, len(inputs)), required, policy.retries, timeout_s)

    proposers = [step(call.id, call.agent, call.layer, call.inputs) for call in graph.calls]
    answer = step(ANSWER, graph.answer.agent if graph.answer else "", graph.depth + 1, graph.finals)
    return (*proposers, answer), tuple(_lost(graph))


def _lost(graph: Graph) -> Iterable[str]:
    gate, policy = graph.spec.gate, graph.spec.policy
    if gate.kind != "all":
        yield f"gate.kind: {gate.kind!r}: nobody picks, so every agent of every layer is asked"
    if policy.streaming != "barrier":
        yield f"policy.streaming: {policy.streaming}: a step sees whole texts only, so each waits for those before it"
    if policy.grace_s is not None:
        yield f"policy.grace_s: {policy.grace_s:g}: stragglers are waited for, and never cut off"
    if policy.layer_deadline_s is not None:
        yield f"policy.layer_deadline_s: {policy.layer_deadline_s:g}: a layer has no deadline, each step has its own"
    if policy.early_exit is not None:
        yield "policy.early_exit: nobody looks whether proposals agree, so every agent is asked"
    yield f"policy.deadline_s: {policy.deadline_s:g}: holds for each step, not for the whole"
