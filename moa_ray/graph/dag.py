"""From layers, or from nodes with inputs, to one checked DAG of calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter

from moa_ray.graph import checks
from moa_ray.graph.source import Path, Source
from moa_ray.graph.spec import ANSWER, RANK, EngineSpec, GraphSpec, PluginAggregator, RankAggregator, VoteAggregator


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
        answer: The aggregator's own call; None where it is none: a vote, or a plug-in's.
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
    if problems := checks.of_spec(spec):
        raise source.errors(problems)
    try:
        calls, finals = _layered(spec) if spec.layers else _free(spec)
    except CycleError as error:
        cycle = error.args[1][::-1]  # graphlib follows the inputs backwards
        raise source.error(
            ("nodes", cycle[0], "inputs"), f"the nodes wait for each other: {' -> '.join(cycle)}"
        ) from None
    if problems := list(checks.of_policy(spec, calls, finals)):
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
        case VoteAggregator() | PluginAggregator():
            return None
