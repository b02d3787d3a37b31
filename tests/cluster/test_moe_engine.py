"""A panel whose agents are a Mixture-of-Experts model with its experts in actors, through the whole system."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa_ray import MoA
from moa_ray.graph import from_dict
from tests.engines import tiny_moe

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]


def test_agents_may_be_a_model_whose_experts_are_actors(tmp_path: Path) -> None:
    tiny_moe.write(tmp_path, window=4096)
    engine = {
        "kind": "moe",
        "model": str(tmp_path),
        "shards": 2,
        "num_cpus_per_shard": 0.1,
        "resources": {"num_cpus": 0.1},
    }
    agents = {name: {"engine": "mixture", "max_tokens": 6, "temperature": 0} for name in ("one", "two", "chief")}
    spec = {"version": 1, "name": "tiny", "engines": {"mixture": engine}, "agents": agents}
    with MoA(from_dict({**spec, "layers": [["one", "two"]], "aggregator": "chief"})) as moa:
        result = moa.run("why?")
    assert {r.agent: (r.state, r.usage.completion_tokens) for r in result.agents} == {
        name: ("finished", 6) for name in agents
    }
    assert result.text
