from __future__ import annotations

from importlib.metadata import EntryPoint
from importlib.util import find_spec
from typing import Any

import pytest

from moa_ray.engines import Scripted, registry
from moa_ray.errors import EngineRefused, SpecError
from moa_ray.graph import EngineSpec, Graph, loads
from moa_ray.graph import plugins as plugin_points

SPEC = """\
version: 1
name: g
engines:
  s: {kind: scripted, model: m}
agents: {a: {engine: s}, chief: {engine: s}}
layers: [[a]]
aggregator: chief
"""


def graph(engine: str) -> Graph:
    return loads(SPEC.replace("{kind: scripted, model: m}", engine), file="g.yaml")


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ("{kind: scriptd, model: m}", "g.yaml:4: engines.s.kind: there is no engine kind 'scriptd'.*mean 'scripted'"),
        ("{kind: scripted, modle: m}", "g.yaml:4: engines.s.model: is missing.*is 'modle' meant to be it"),
        ("{kind: zzz, model: m}", "there are: .*llamacpp, moe, openai, scripted.*vllm"),
        ("{kind: scripted, model: m, tfft_s: 1}", "g.yaml:4: engines.s.tfft_s: unknown key.*did you mean 'ttft_s'"),
        ("{kind: scripted, model: m, ttft_s: -1}", "g.yaml:4: engines.s.ttft_s: must be at least 0, not -1"),
        ("{kind: scripted, model: m, faults: [{kind: explode}]}", r"engines.s.faults\[0\].kind: must be 'unavailable'"),
        ("{kind: openai, model: m, base_url: here}", "engines.s.base_url: must have the form .*https.*, not 'here'"),
        ("{kind: llamacpp, model: m, slots: 0}", "engines.s.slots: must be greater than 0"),
    ],
)  # fmt: skip
def test_kind_and_options_are_checked_with_their_place(engine: str, says: str) -> None:
    with pytest.raises(SpecError, match=f"(?s){says}"):
        registry.check(graph(engine))


def test_resources_not_given_are_the_kinds_own() -> None:
    spec = EngineSpec.model_validate({"kind": "llamacpp", "model": "m", "resources": {"num_gpus": 0.5}})
    resources = registry.resources_of(spec)
    assert (resources.num_cpus, resources.num_gpus) == (1, 0.5)


@pytest.mark.parametrize(
    ("keys", "resources", "workers"),
    [
        ({}, (1, 1), 1),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, (4, 4), 4),
        ({"device": "cpu"}, (1, 0), 1),
        ({"tensor_parallel_size": 2, "resources": {"num_gpus": 1}}, (2, 1), 2),
    ],
)
def test_a_vllm_replica_takes_what_its_workers_need(
    keys: dict[str, Any], resources: tuple[float, float], workers: int
) -> None:
    spec = EngineSpec.model_validate({"kind": "vllm", "model": "m", **keys})
    found = registry.resources_of(spec)
    assert ((found.num_cpus, found.num_gpus), registry.workers_of(spec)) == (resources, workers)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
async def test_where_vllm_is_missing_one_line_names_the_extra() -> None:
    spec = EngineSpec.model_validate({"kind": "vllm", "model": "smollm2-135m-instruct"})
    with pytest.raises(EngineRefused, match=r"(?s)need vLLM.*moa-ray\[vllm\]"):
        await registry.create(spec)


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """Entry points as an installed package would bring them."""
    installed: list[EntryPoint] = []

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [point for point in installed if point.group == group and name in (None, point.name)]

    monkeypatch.setattr(plugin_points, "entry_points", entry_points)
    return installed


async def test_a_plugin_brings_a_kind(plugins: list[EntryPoint]) -> None:
    plugins.append(EntryPoint("mine", "moa_ray.engines.scripted:Scripted", registry.KINDS.group))
    assert "mine" in registry.KINDS.names()
    spec = EngineSpec.model_validate({"kind": "mine", "model": "m", "reply": "hello"})
    engine: Any = await registry.create(spec)
    assert isinstance(engine, Scripted) and engine.options.reply == "hello"


def test_a_plugin_that_cannot_be_imported_is_told(plugins: list[EntryPoint]) -> None:
    plugins.append(EntryPoint("broken", "no_such_package:Engine", registry.KINDS.group))
    with pytest.raises(SpecError, match=r"engine kind 'broken' \(no_such_package:Engine\) cannot be loaded"):
        registry.check(graph("{kind: broken, model: m}"))
