"""What is compared: each arm is a graph, or one agent of it, so that all are served in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from moa_ray.engines import registry
from moa_ray.errors import RequestError
from moa_ray.evaluate.scorers import VOTES
from moa_ray.graph import Graph, from_dict
from moa_ray.graph.dag import build
from moa_ray.graph.source import Source
from moa_ray.graph.spec import Gate, VoteAggregator


@dataclass(frozen=True, slots=True)
class Arm:
    """One of those that are compared.

    Args:
        name: For people.
        graph: What is run.
        agent: Its agent that is asked alone; None for the whole graph.
    """

    name: str
    graph: Graph
    agent: str | None = None


def arms_of(graph: Graph, *, seed: int) -> list[Arm]:
    """A graph, and each of its proposers alone.

    Every agent without a seed gets one that depends on its name alone. So an agent that is asked the same by two arms
    gives the same answer, which is asked for once: arms are paired on byte-identical proposals.

    Raises:
        SpecError: If an engine's kind is not known.
    """
    registry.check(graph)
    seeds = {name: seed + crc32(name.encode()) % 2**20 for name in graph.spec.agents}
    agents = {
        name: agent.model_copy(update={"seed": seeds[name] if agent.seed is None else agent.seed})
        for name, agent in graph.spec.agents.items()
    }
    seeded = build(graph.spec.model_copy(update={"agents": agents}), graph.source)
    proposers = dict.fromkeys(call.agent for call in seeded.calls)
    return [Arm(graph.spec.name, seeded), *(Arm(f"{graph.spec.name}/{name}", seeded, name) for name in proposers)]


def self_consistency(arm: Arm, samples: int, scorer: str | None) -> Arm:
    """One agent, asked several times: what the tokens of a panel buy without one.

    Its answers are voted on (Wang et al. 2022) where the scorer looks at a part of them that can be; else the agent
    itself makes one of them (Self-MoA, Li et al. 2025).
    """
    assert arm.agent
    spec, agent = arm.graph.spec, arm.graph.spec.agents[arm.agent]
    engine = arm.graph.engines[arm.graph.engine_of(arm.agent)]  # of its own, where the agent declares it
    used = {arm.graph.engine_of(arm.agent), *agent.fallbacks}
    agents = {arm.agent: agent.model_copy(update={"samples": samples})}
    vote, chief = VOTES.get(scorer or ""), f"{arm.agent[:50]}-aggregator"
    if vote is None:
        agents[chief] = agent.model_copy(update={"samples": 1, "engine": engine})
    alone = spec.model_copy(
        update={
            "name": f"{arm.agent[:50]}-x{samples}",
            "engines": {name: each for name, each in spec.engines.items() if name in used},
            "agents": agents,
            "layers": [[arm.agent]],
            "nodes": {},
            "aggregator": VoteAggregator(vote=vote) if vote else chief,
            "gate": Gate(),
            "policy": spec.policy.model_copy(update={"quorum": 1, "early_exit": None}),
        }
    )
    return Arm(f"{arm.name} x {samples}", build(alone, Source()))


def endpoint(place: str, *, api_key: str | None = None) -> Arm:
    """A model of any OpenAI-compatible endpoint, written `URL#MODEL`.

    Raises:
        RequestError: If it is written otherwise.
    """
    url, _, model = place.partition("#")
    if not (url.startswith(("http://", "https://")) and model):
        raise RequestError(f"{place!r} is no endpoint", hint="write http://127.0.0.1:8000/v1#MODEL")
    engine: Mapping[str, Any] = {"kind": "openai", "model": model, "base_url": url} | (
        {"api_key": api_key} if api_key else {}
    )
    graph = from_dict(
        {
            "version": 1,
            "name": "endpoint",
            "engines": {"endpoint": engine},
            "agents": {"endpoint": {"engine": "endpoint"}},
            "layers": [["endpoint"]],
            "aggregator": "endpoint",
        }
    )
    return Arm(model, graph, "endpoint")
