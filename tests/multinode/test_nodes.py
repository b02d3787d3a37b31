"""Nodes that come, go and die under load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ray import serve
from ray.cluster_utils import Cluster

from moa_ray import MoA
from moa_ray.cluster import operate
from moa_ray.cluster.deploy import deploy
from moa_ray.cluster.session import details_of, serve_details
from moa_ray.errors import ResourcesShort
from moa_ray.graph import Graph
from moa_ray.server import ServerSettings
from moa_ray.server.deployed import http
from tests.conftest import until
from tests.multinode.load import Load, panel

APP = "panel"
ENGINES = ("engine.panel.a", "engine.panel.b", "engine.panel.chief")


@pytest.fixture(autouse=True)
def other_nodes(cluster: Cluster) -> Iterator[None]:
    """Nodes that a test added go with it."""
    yield
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)


@contextmanager
def up(graph: Graph) -> Iterator[str]:
    """`graph`, served; yields the URL."""
    deploy([graph], APP, http=http(ServerSettings()), route_prefix="/", may_grow=True)
    try:
        yield f"http://127.0.0.1:{serve_details()['http_options']['port']}"
    finally:
        serve.delete(APP)


def homes(deployment: str) -> list[str]:
    """The node of each replica that runs."""
    found = details_of(APP)["deployments"][deployment]["replicas"]
    return sorted(replica["node_id"] for replica in found if replica["state"] == "RUNNING")


def each_in_the_room(replicas: int | dict[str, Any]) -> Graph:
    """A panel each of whose replicas takes one of the resource `room`."""
    engine = {"resources": {"custom": {"room": 1}}, "replicas": replicas}
    return panel(dict.fromkeys(("a", "b", "chief"), engine))


def test_agents_land_where_their_resources_are(cluster: Cluster) -> None:
    slow = cluster.add_node(num_cpus=0, resources={"slow": 2})
    fast = cluster.add_node(num_cpus=0, resources={"fast": 2})
    quick = {"resources": {"custom": {"fast": 1}}}
    with up(panel({"a": {"resources": {"custom": {"slow": 1}}, "replicas": 2}, "b": quick, "chief": quick})):
        found = [set(homes(name)) for name in ENGINES]
    assert found == [{slow.node_id}, {fast.node_id}, {fast.node_id}]


def test_what_takes_nothing_is_not_on_the_head_where_there_are_other_nodes(cluster: Cluster) -> None:
    other = cluster.add_node(num_cpus=0)
    with up(panel({})):
        found = {name: set(homes(name)) for name in ("gateway", "router.panel", *ENGINES)}
    assert found == {name: {other.node_id} for name in found}


def test_an_engine_that_no_single_node_can_hold_is_told_before_anything_starts(cluster: Cluster) -> None:
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    graph = panel({"a": {"resources": {"num_cpus": 3}}})
    with pytest.raises(ResourcesShort, match=r"engine 'a' needs 3 CPU .* has 5, .*, no single node has that many"):
        MoA(graph, address=cluster.address)
    assert not serve.status().applications


def test_a_node_that_joins_is_used_and_when_it_dies_under_load_no_request_is_lost(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moa_ray.cluster.deploy.PLACE_TIMEOUT_S", 5.0)
    first = cluster.add_node(num_cpus=0, resources={"room": 3})
    with up(each_in_the_room(1)) as url:
        twice = dict.fromkeys(("a", "b", "chief"), 2)
        with pytest.raises(ResourcesShort, match="needs 1 room for each replica; the cluster has 3, 0 of them free"):
            operate.scale(APP, twice)
        second = cluster.add_node(num_cpus=0, resources={"room": 3})
        with Load(url) as load:
            load.goes_on()
            operate.scale(APP, twice)
            both = sorted([first.node_id, second.node_id])
            assert [homes(name) for name in ENGINES] == [both] * 3
            load.goes_on()
            cluster.remove_node(second, allow_graceful=False)
            load.goes_on(60)
            third = cluster.add_node(num_cpus=0, resources={"room": 3})
            both = sorted([first.node_id, third.node_id])
            until(lambda: [homes(name) for name in ENGINES] == [both] * 3, within_s=120)
            load.goes_on()
    load.lost_nothing("a node joined, died, and was replaced")


def test_replicas_follow_the_load_up_and_down(cluster: Cluster) -> None:
    for _ in range(2):
        cluster.add_node(num_cpus=0, resources={"room": 3})
    scaling = {"min": 1, "max": 2, "target_ongoing_requests": 1, "upscale_delay_s": 1, "downscale_delay_s": 1}
    with up(each_in_the_room(scaling)) as url:
        with Load(url) as load:
            until(lambda: min(len(homes(name)) for name in ENGINES) == 2, within_s=120)
            load.goes_on()
            assert {node for name in ENGINES for node in homes(name)} == {n.node_id for n in cluster.worker_nodes}
        until(lambda: max(len(homes(name)) for name in ENGINES) == 1, within_s=120)
    load.lost_nothing("replicas came and went with the load")


def test_requests_go_on_while_the_heads_store_of_state_restarts(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=0, resources={"room": 6})
    with up(each_in_the_room(1)) as url, Load(url) as load:
        load.goes_on()
        cluster.head_node.kill_gcs_server()
        load.goes_on(40)
        cluster.head_node.start_gcs_server()
        load.goes_on(40)
        operate.scale(APP, {"a": 2})
        load.goes_on()
    load.lost_nothing("the GCS was away for a while")
