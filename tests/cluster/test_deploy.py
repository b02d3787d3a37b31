from __future__ import annotations

from typing import Any

import pytest

from moa_ray.cluster.app import placement
from moa_ray.cluster.deploy import _bundles, _fits
from moa_ray.graph import EngineSpec


def spec(**keys: Any) -> EngineSpec:
    return EngineSpec.model_validate({"kind": "vllm", "model": "m", **keys})


def test_workers_share_a_replicas_resources_bundle_by_bundle() -> None:
    four = spec(tensor_parallel_size=4, resources={"num_cpus": 8, "accelerator_type": "H100"})
    placed = placement(four)
    assert placed["placement_group_bundles"] == [{"CPU": 2, "GPU": 1, "accelerator_type:H100": 0.001}] * 4
    assert placed["ray_actor_options"] == {"num_cpus": 0, "num_gpus": 0}


def test_an_engine_without_workers_takes_its_resources_itself() -> None:
    assert placement(EngineSpec.model_validate({"kind": "llamacpp", "model": "m", "resources": {"num_cpus": 2}})) == {
        "ray_actor_options": {"num_cpus": 2, "num_gpus": 0}
    }


@pytest.mark.parametrize(
    ("nodes", "fits"),
    [
        ([{"GPU": 4, "CPU": 9}], True),
        ([{"GPU": 2, "CPU": 2}, {"GPU": 2, "CPU": 2}], True),
        ([{"GPU": 3, "CPU": 9}], False),
        ([{"GPU": 4, "CPU": 3}], False),
        ([{"GPU": 8}, {"CPU": 8}], False),
        ([], False),
    ],
)
def test_bundles_fit_where_each_finds_one_node_with_all_of_it(nodes: list[dict[str, float]], fits: bool) -> None:
    assert _fits(_bundles(spec(tensor_parallel_size=4)), nodes) is fits
