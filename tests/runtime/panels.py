"""Graphs over scripted engines in this process, for tests of the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moa_ray.engines import Scripted, ScriptedOptions
from moa_ray.gates import registry
from moa_ray.graph import Graph, from_dict
from moa_ray.runtime import Runner


def panel(
    *layers: int, spec: Mapping[str, Any] | None = None, agents: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Runner, Scripted]:
    """A layered graph of so many agents a layer (`a1`, `a2`, ... shared by the layers) and the aggregator `chief`.

    Args:
        layers: Agents a layer.
        spec: Further keys of the spec.
        agents: Further keys of single agents.
        options: Options of the one scripted engine that all share.
    """
    names = [f"a{n}" for n in range(1, max(layers) + 1)]
    extra = agents or {}
    graph = from_dict(
        {
            "version": 1,
            "name": "panel",
            "engines": {"script": {"kind": "scripted", "model": "script", **options}},
            "agents": {name: {"engine": "script", **extra.get(name, {})} for name in [*names, "chief"]},
            "layers": [names[:count] for count in layers],
            "aggregator": "chief",
            **(spec or {}),
        }
    )
    return runner(graph)


def runner(graph: Graph) -> tuple[Runner, Scripted]:
    """A runner of `graph`, whose engines must be one scripted engine."""
    (name,) = graph.engines
    engine = Scripted(ScriptedOptions.model_validate(graph.engines[name].options), model="script")
    registry.check(graph)
    gate = None if graph.spec.gate.kind == "all" else (registry.create(graph), registry.timeout_s(graph))
    return Runner(graph, {name: engine}, gate=gate), engine


_AGENT = {"engine": "script"}
_AGENTS = {"a": {**_AGENT, "system": "Be brief.", "samples": 2}, "b": _AGENT, "c": {**_AGENT, "seed": 3}}
_CHIEF = {"chief": {**_AGENT, "system": "Judge."}}
_NODES = {"x": {"agent": "a"}, "y": {"agent": "b"}, "z": {"agent": "c", "inputs": ["y", "x"]}}
_BASE = {"version": 1, "name": "panel", "engines": {"script": {"kind": "scripted", "model": "script"}}}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    kind: {**_BASE, "agents": agents, **shape}
    for kind, agents, shape in (
        ("layers", _AGENTS | _CHIEF, {"layers": [["a", "b"], ["b", "c"]], "aggregator": "chief"}),
        ("nodes", _AGENTS | _CHIEF, {"nodes": _NODES, "aggregator": "chief"}),
        ("rank", _AGENTS | _CHIEF, {"layers": [["a", "b", "c"]], "aggregator": {"rank": {"agent": "chief"}}}),
        ("vote", _AGENTS, {"layers": [["a", "b", "c"]], "aggregator": {"vote": {"extract": "number"}}}),
    )
}
"""A spec of every shape that a graph can have, with samples, systems and seeds."""
