"""From layers, or from nodes with inputs, to one checked DAG of calls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter

from moa_ray.graph import agreement
from moa_ray.graph.source import Path, Problem, Source, did_you_mean
from moa_ray.graph.spec import Agent, EngineSpec, GraphSpec, Node, Rank, RankAggregator, VoteAggregator

ANSWER, RANK = "answer", "rank"
"""Ids of the aggregator's own call."""


@dataclass(frozen=True, slots=True)
class Call:
    """One engine call of a request.

    Args:
        id: `1/skeptic` (layer, agent) in a layered graph, the node's name in a free one, `#2` behind it for
            the second sample; `answer` or `rank` for the aggregator's own.
        agent: Who answers.
        layer: Layer from 1; in a free graph one more than the highest of its inputs.
        inputs: Ids of the calls whose answers it sees, in the user's order.
        sample: Number of the sample, from 1.
    """

    id: str
    agent: str
    layer: int
    inputs: tuple[str, ...] = ()
    sample: int = 1


@dataclass(frozen=True)
class Graph:
    """A checked graph.

    Args:
        spec: What the user wrote.
        source: Where each key of it stands.
        calls: The proposers' calls, inputs before those that see them.
        finals: Ids of the calls whose answers the aggregator sees.
        answer: The aggregator's own call; None for a vote.
    """

    spec: GraphSpec
    source: Source = field(repr=False)
    calls: tuple[Call, ...]
    finals: tuple[str, ...]
    answer: Call | None

    @cached_property
    def engines(self) -> Mapping[str, EngineSpec]:
        """All engines by name; an agent's own engine has the agent's name."""
        own = {name: agent.engine for name, agent in self.spec.agents.items() if isinstance(agent.engine, EngineSpec)}
        return {**self.spec.engines, **own}

    def engine_of(self, agent: str) -> str:
        """Name of the engine of `agent`."""
        engine = self.spec.agents[agent].engine
        return engine if isinstance(engine, str) else agent

    def path_of_engine(self, name: str) -> Path:
        """Where the engine `name` is declared."""
        return ("engines", name) if name in self.spec.engines else ("agents", name, "engine")

    def with_engines(self, engines: Mapping[str, EngineSpec]) -> Graph:
        """The same graph over other engines of the same names."""
        declared = {name: engines.get(name, spec) for name, spec in self.spec.engines.items()}
        agents = {
            name: agent.model_copy(update={"engine": engines.get(name, agent.engine)})
            if isinstance(agent.engine, EngineSpec)
            else agent
            for name, agent in self.spec.agents.items()
        }
        return replace(self, spec=self.spec.model_copy(update={"engines": declared, "agents": agents}))

    def with_layers(self, layers: Sequence[Sequence[str]]) -> Graph:
        """The same layered graph with only these agents in each layer."""
        spec = self.spec.model_copy(update={"layers": [list(agents) for agents in layers]})
        calls, finals = _layered(spec)
        return replace(self, spec=spec, calls=calls, finals=finals, answer=_answer(spec, calls, finals))

    @cached_property
    def depth(self) -> int:
        """Layers of proposers."""
        return max(call.layer for call in self.calls)

    def agents_of_layer(self, layer: int) -> tuple[str, ...]:
        """Agents of a layer, in order; the aggregator's is layer `depth` + 1."""
        calls = (*self.calls, self.answer) if self.answer else self.calls
        return tuple(dict.fromkeys(call.agent for call in calls if call.layer == layer))


def build(spec: GraphSpec, source: Source) -> Graph:
    """The graph of `spec`.

    Raises:
        SpecError: For names that are not there, cycles, and settings that contradict each other.
    """
    problems = [*_shape(spec), *_names(spec), *_aggregator(spec)]
    if problems := problems or list(_unused(spec)):  # a misspelled name leaves another one unused
        raise source.errors(problems)
    try:
        calls, finals = _layered(spec) if spec.layers else _free(spec)
    except CycleError as error:
        cycle = error.args[1][::-1]  # graphlib follows the inputs backwards
        raise source.error(
            ("nodes", cycle[0], "inputs"), f"the nodes wait for each other: {' -> '.join(cycle)}"
        ) from None
    if problems := list(_policy(spec, calls, finals)):
        raise source.errors(problems)
    return Graph(spec, source, calls, finals, _answer(spec, calls, finals))


# ---------------------------------------------------------------- layers and nodes to calls


def _layered(spec: GraphSpec) -> tuple[tuple[Call, ...], tuple[str, ...]]:
    calls: list[Call] = []
    before: tuple[str, ...] = ()
    for layer, agents in enumerate(spec.layers, start=1):
        here = [call for agent in agents for call in _samples(spec, f"{layer}/{agent}", agent, layer, before)]
        calls += here
        before = tuple(call.id for call in here)
    return tuple(calls), before


def _free(spec: GraphSpec) -> tuple[tuple[Call, ...], tuple[str, ...]]:
    of_node: dict[str, list[Call]] = {}
    for name in TopologicalSorter({name: node.inputs for name, node in spec.nodes.items()}).static_order():
        node = spec.nodes[name]
        seen = [call for given in node.inputs for call in of_node[given]]
        layer = max((call.layer for call in seen), default=0) + 1
        of_node[name] = list(_samples(spec, name, node.agent, layer, tuple(call.id for call in seen)))
    used = {given for node in spec.nodes.values() for given in node.inputs}
    calls = tuple(call for group in of_node.values() for call in group)
    return calls, tuple(call.id for name in spec.nodes if name not in used for call in of_node[name])


def _samples(spec: GraphSpec, name: str, agent: str, layer: int, inputs: tuple[str, ...]) -> Iterable[Call]:
    count = spec.agents[agent].samples
    for sample in range(1, count + 1):
        yield Call(f"{name}#{sample}" if count > 1 else name, agent, layer, inputs, sample)


def _answer(spec: GraphSpec, calls: tuple[Call, ...], finals: tuple[str, ...]) -> Call | None:
    layer = max(call.layer for call in calls) + 1
    match spec.aggregator:
        case str(agent):
            return Call(ANSWER, agent, layer, finals)
        case RankAggregator(rank=rank):
            return Call(RANK, rank.agent, layer, finals)
        case VoteAggregator():
            return None


# ---------------------------------------------------------------- checks


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
    names = sorted(known)
    return Problem(
        path, f"there is no {what} {name!r}", did_you_mean(name, names) or f"there are: {', '.join(names) or 'none'}"
    )


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
        case VoteAggregator():
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


def smallest_layer(calls: tuple[Call, ...], finals: tuple[str, ...], *, layered: bool) -> int:
    """Answers that a quorum can count on: of the smallest layer, or in a free graph those that the aggregator sees."""
    return min(Counter(call.layer for call in calls).values()) if layered else len(finals)


def _policy(spec: GraphSpec, calls: tuple[Call, ...], finals: tuple[str, ...]) -> Iterable[Problem]:
    policy = spec.policy
    smallest = smallest_layer(calls, finals, layered=bool(spec.layers))
    if policy.quorum > smallest:
        where = "the smallest layer has" if spec.layers else "the aggregator sees"
        yield Problem(("policy", "quorum"), f"{policy.quorum} answers can never be had: {where} {smallest}")
    if policy.early_exit is not None and policy.early_exit.measure not in agreement.names():
        path: Path = ("policy", "early_exit", "measure")
        yield _dangling(path, "measure of agreement", policy.early_exit.measure, agreement.names())
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
