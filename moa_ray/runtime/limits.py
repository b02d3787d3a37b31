"""What one request may change of its graph, and how far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from moa_ray.errors import ModelNotFound, RequestError
from moa_ray.graph import ANSWER, Call, Graph, Policy
from moa_ray.graph.checks import smallest_layer
from moa_ray.graph.source import dotted, problems_of, which


def policy_for(graph: Graph, wanted: Mapping[str, Any]) -> Policy:
    """The graph's policy with the keys of a request.

    A request may not cost more than `limits` of the spec allow; where they say nothing, than the policy itself.

    Raises:
        RequestError: For unknown keys, wrong types and values beyond the limits; names the key.
    """
    policy, limits = graph.spec.policy, graph.spec.limits
    if not wanted:
        return policy
    try:
        changed = Policy.model_validate({**policy.model_dump(), **wanted})
    except ValidationError as error:
        first = problems_of(error, Policy)[0]
        raise RequestError(f"policy.{dotted(first.path)}: {first.message}", hint=first.hint) from None
    ceilings = {
        "deadline_s": limits.deadline_s or policy.deadline_s,
        "retries": policy.retries if limits.retries is None else limits.retries,
        "quorum": smallest_layer(graph.calls, graph.finals, layered=bool(graph.spec.layers)),
    }
    for key, most in ceilings.items():
        if key in wanted and getattr(changed, key) > most:
            raise RequestError(f"policy.{key}: {getattr(changed, key):g} is more than the {most:g} allowed here")
    if changed.hedge and changed.hedge != policy.hedge:
        raise RequestError("policy.hedge: a request can switch hedging off, not on")
    return changed


def counts_for(graph: Graph, k: int | Sequence[int] | None) -> list[int]:
    """How many agents of each layer a request asks: `k`, or of layer by layer so many; at most all of them.

    Raises:
        RequestError: If the graph has no layers, or `k` does not fit them or the quorum.
    """
    sizes = [len(agents) for agents in graph.spec.layers]
    if k is None:
        most = graph.spec.gate.k
        return sizes if most is None else [min(most, size) for size in sizes]
    if not sizes:
        raise RequestError(f"k: {graph.spec.name} is not layered, so no layer can be made smaller")
    counts = [min(k, size) for size in sizes] if isinstance(k, int) else list(k)
    if len(counts) != len(sizes):
        raise RequestError(f"k: {len(counts)} numbers for the {len(sizes)} layers of {graph.spec.name}")
    for layer, (count, size) in enumerate(zip(counts, sizes, strict=True), start=1):
        if not graph.spec.policy.quorum <= count <= size:
            raise RequestError(
                f"k: layer {layer} has {size} agents and a quorum of {graph.spec.policy.quorum}; {count} is not between"
            )
    return counts


def answer_for(graph: Graph, agent: str | None) -> Call | None:
    """The call that answers: the aggregator's, or that of one `agent` alone.

    Raises:
        ModelNotFound: If there is no such agent.
    """
    if agent is None:
        return graph.answer
    if agent not in graph.spec.agents:
        known = graph.spec.agents
        hint = which(agent, known)
        raise ModelNotFound(f"{graph.spec.name} has no agent {agent!r}", hint=hint)
    return Call(ANSWER, agent, graph.depth + 1)


def step_for(
    graph: Graph, quorum: int, name: str | None, proposals: Mapping[str, str]
) -> tuple[tuple[Call, ...], Call | None]:
    """One call of the graph alone, and those whose texts it is shown.

    Args:
        graph: The graph.
        quorum: The request's.
        name: Id of the call; `answer` is the aggregator, whatever its kind.
        proposals: What it is shown, by the id of the call that wrote it.

    Returns:
        The calls that wrote the proposals, in the order in which they are shown, and the call; None for a vote.

    Raises:
        RequestError: If the graph has no such call, or the proposals are not those that it sees.
    """
    calls = {call.id: call for call in graph.calls}
    steps = {**calls, ANSWER: graph.answer, **({graph.answer.id: graph.answer} if graph.answer else {})}
    if name is None:
        raise RequestError("proposals: for which call?", hint=f"say call: one of {', '.join(steps)}")
    if name not in steps:
        hint = which(name, steps)
        raise RequestError(f"call: {graph.spec.name} has no call {name!r}", hint=hint)
    step = steps[name]
    sees = graph.finals if step is None else step.inputs
    if strange := [each for each in proposals if each not in sees]:
        raise RequestError(
            f"proposals: {name} does not see {', '.join(strange)}", hint=f"it sees: {', '.join(sees) or 'nothing'}"
        )
    given = tuple(replace(calls[each], inputs=()) for each in sees if each in proposals)
    required = {each for each in sees if graph.spec.agents[calls[each].agent].required}
    if missing := sorted(required - proposals.keys()):
        raise RequestError(f"proposals: {name} needs that of {', '.join(missing)}")
    if len(given) < min(quorum, len(sees)):
        raise RequestError(f"proposals: {name} sees {len(sees)}, with a quorum of {quorum}; {len(given)} are too few")
    return given, None if step is None else replace(step, inputs=tuple(call.id for call in given))
