"""What can be wrong with a graph though each key is right: names, kinds, settings that contradict each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from moa_ray.errors import SpecError
from moa_ray.graph import aggregators, agreement
from moa_ray.graph.source import Path, Problem, problems_of, which
from moa_ray.graph.spec import (
    ANSWER,
    RANK,
    Agent,
    EngineSpec,
    GraphSpec,
    Node,
    PluginAggregator,
    Rank,
    RankAggregator,
    VoteAggregator,
)

if TYPE_CHECKING:
    from moa_ray.graph.dag import Call


def of_spec(spec: GraphSpec) -> list[Problem]:
    """Names that lead nowhere, and shapes that are none."""
    problems = [*_shape(spec), *_names(spec), *_aggregator(spec)]
    return problems or list(_unused(spec))  # a misspelled name leaves another one unused


def _shape(spec: GraphSpec) -> Iterable[Problem]:
    if spec.layers and spec.nodes:
        yield Problem(("nodes",), "a graph has either layers or nodes, not both")
    if not spec.layers and not spec.nodes:
        yield Problem((), "there is nobody to aggregate", "write layers: [[agent, …], …], or nodes with inputs")
    for name in spec.agents.keys() & spec.engines.keys():
        if isinstance(spec.agents[name].engine, EngineSpec):
            yield Problem(("agents", name, "engine"), f"an engine of its own would be called {name!r}, which is taken")


def _names(spec: GraphSpec) -> Iterable[Problem]:
    """Names that lead nowhere."""
    for name, agent in spec.agents.items():
        if isinstance(agent.engine, str) and agent.engine not in spec.engines:
            yield _dangling(("agents", name, "engine"), "engine", agent.engine, spec.engines)
        yield from _fallbacks(spec, name, agent)
    for path, agent_name in _mentions(spec):
        if agent_name not in spec.agents:
            yield _dangling(path, "agent", agent_name, spec.agents)
    for number, layer in enumerate(spec.layers):
        for position, agent_name in enumerate(layer):
            if agent_name in layer[:position]:
                hint = f"for several answers of one agent write samples: {layer.count(agent_name)}"
                yield Problem(("layers", number, position), f"{agent_name!r} stands twice in this layer", hint)
    for name, node in spec.nodes.items():
        if name in (ANSWER, RANK):
            yield Problem(("nodes", name), "the aggregator's own call has this name", "call the node otherwise")
        yield from _inputs(spec, name, node)


def _fallbacks(spec: GraphSpec, name: str, agent: Agent) -> Iterable[Problem]:
    for position, engine in enumerate(agent.fallbacks):
        path: Path = ("agents", name, "fallbacks", position)
        if engine not in spec.engines:
            yield _dangling(path, "engine", engine, spec.engines)
        elif engine == agent.engine or engine in agent.fallbacks[:position]:
            yield Problem(path, f"{engine!r} is asked already", "a fallback is another engine")


def _inputs(spec: GraphSpec, name: str, node: Node) -> Iterable[Problem]:
    for position, given in enumerate(node.inputs):
        path: Path = ("nodes", name, "inputs", position)
        if given not in spec.nodes:
            yield _dangling(path, "node", given, spec.nodes)
        elif given in node.inputs[:position]:
            yield Problem(path, f"{given!r} stands twice")


def _dangling(path: Path, what: str, name: str, known: Iterable[str]) -> Problem:
    return Problem(path, f"there is no {what} {name!r}", which(name, sorted(known)))


def _mentions(spec: GraphSpec) -> Iterable[tuple[Path, str]]:
    """Every place that names an agent."""
    for number, layer in enumerate(spec.layers):
        for position, agent in enumerate(layer):
            yield ("layers", number, position), agent
    for name, node in spec.nodes.items():
        yield ("nodes", name, "agent"), node.agent
    match spec.aggregator:
        case str(agent):
            yield ("aggregator",), agent
        case RankAggregator(rank=rank):
            yield ("aggregator", "rank", "agent"), rank.agent
        case VoteAggregator() | PluginAggregator():
            pass
    if spec.gate.agent is not None:
        yield ("gate", "agent"), spec.gate.agent


def _unused(spec: GraphSpec) -> Iterable[Problem]:
    """Whoever is declared and never asked is most often a name misspelled elsewhere."""
    asked = {agent for _, agent in _mentions(spec)}
    for name in spec.agents.keys() - asked:
        yield Problem(("agents", name), "no layer, node, aggregator or gate asks this agent", "use it or remove it")
    agents = spec.agents.values()
    used = {name for agent in agents for name in (agent.engine, *agent.fallbacks) if isinstance(name, str)}
    for name in spec.engines.keys() - used:
        yield Problem(("engines", name), "no agent uses this engine", "use it or remove it")


def _aggregator(spec: GraphSpec) -> Iterable[Problem]:
    match spec.aggregator:
        case str(agent) | RankAggregator(rank=Rank(agent=agent)):
            if agent in spec.agents and spec.agents[agent].samples > 1:
                yield Problem(("agents", agent, "samples"), "an aggregator answers once")
        case VoteAggregator(vote=vote):
            if (vote.extract == "regex") != (vote.pattern is not None):
                yield Problem(("aggregator", "vote"), "extract: regex and pattern go together")
            try:
                re.compile(vote.pattern or "")
            except re.error as error:
                yield Problem(("aggregator", "vote", "pattern"), f"this is no regular expression: {error}")
        case PluginAggregator(kind=name, options=options):
            yield from _of_a_plugin(name, options)


def _of_a_plugin(name: str, options: Mapping[str, Any]) -> Iterable[Problem]:
    try:
        kind = aggregators.KINDS.find(name)
        if not (isinstance(kind, type) and issubclass(kind, aggregators.Aggregator)):
            yield Problem(
                ("aggregator", "kind"), f"{name!r} is no subclass of {aggregators.Aggregator.__module__}.Aggregator"
            )
            return
        kind.model_validate(options)
    except SpecError as error:
        yield Problem(("aggregator", "kind"), error.message, error.hint)
    except ValidationError as error:
        yield from problems_of(error, kind, ("aggregator",))
    except TypeError as error:  # it lacks a method
        yield Problem(("aggregator", "kind"), str(error))


def smallest_layer(calls: tuple[Call, ...], finals: tuple[str, ...], *, layered: bool) -> int:
    """Answers that a quorum can count on: of the smallest layer, or in a free graph those that the aggregator sees."""
    return min(Counter(call.layer for call in calls).values()) if layered else len(finals)


def of_policy(spec: GraphSpec, calls: tuple[Call, ...], finals: tuple[str, ...]) -> Iterable[Problem]:
    """Settings that contradict each other, or the graph's calls."""
    policy = spec.policy
    smallest = smallest_layer(calls, finals, layered=bool(spec.layers))
    if policy.quorum > smallest:
        where = "the smallest layer has" if spec.layers else "the aggregator sees"
        yield Problem(("policy", "quorum"), f"{policy.quorum} answers can never be had: {where} {smallest}")
    if policy.early_exit is not None:
        try:
            agreement.MEASURES.find(policy.early_exit.measure)
        except SpecError as error:
            yield Problem(("policy", "early_exit", "measure"), error.message, error.hint)
    yield from _gate(spec)
    yield from _times(spec)
    engines = [*spec.engines.values(), *(a.engine for a in spec.agents.values() if isinstance(a.engine, EngineSpec))]
    if policy.hedge and all(engine.most_replicas < 2 for engine in engines):
        hint = "give an engine replicas: 2"
        yield Problem(("policy", "hedge"), "no engine has a second replica that could be asked", hint)


def _gate(spec: GraphSpec) -> Iterable[Problem]:
    gate, largest = spec.gate, max(map(len, spec.layers), default=0)
    if not spec.layers and gate.kind != "all":
        yield Problem(("gate",), "a gate picks agents of layers, and this graph has nodes", "write it with layers")
    elif gate.k and gate.k > largest:
        yield Problem(("gate", "k"), f"{gate.k} agents cannot be picked: the largest layer has {largest}")
    elif gate.k and gate.k < spec.policy.quorum:
        yield Problem(("gate", "k"), f"{gate.k} agents never make the quorum of {spec.policy.quorum}")
    elif gate.k and gate.kind == "all" and gate.k < largest:
        hint = "kind: random picks without a reason; moa-ray's other kinds have one"
        yield Problem(("gate", "k"), "kind: all asks every agent, whatever k", hint)


def _times(spec: GraphSpec) -> Iterable[Problem]:
    """Waits that could never end as written, because a shorter one ends first."""
    policy = spec.policy
    waits: list[tuple[Path, str, float | None]] = [(("policy", "grace_s"), "the grace", policy.grace_s)]
    for name, agent in spec.agents.items():
        waits.append((("agents", name, "patience_s"), "the patience", agent.patience_s))
        if agent.patience_s is not None and policy.grace_s is None:
            hint = "set policy.grace_s, or remove it"
            yield Problem(("agents", name, "patience_s"), "a layer without a grace waits for everybody", hint)
    if policy.layer_deadline_s and policy.layer_deadline_s > policy.deadline_s:
        message = f"a layer's deadline is longer than the whole request's of {policy.deadline_s:g} s"
        yield Problem(("policy", "layer_deadline_s"), message)
    for path, what, wait_s in waits:
        for limit, limit_s in (("deadline", policy.deadline_s), ("layer deadline", policy.layer_deadline_s)):
            if wait_s is not None and limit_s is not None and wait_s >= limit_s:
                yield Problem(path, f"{what} is not shorter than the {limit} of {limit_s:g} s")
                break
