"""Nodes with addresses of their own: the head's machine dies, and machines come and go with the load."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import yaml
from grpc import RpcError
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.autoscaler.v2.sdk import get_cluster_status

from moa_ray.graph import Graph
from tests.conftest import until
from tests.multinode.load import Load, panel
from tests.multinode.machines import GCS_PORT, OURS, Machine, network
from tests.multinode.redis import redis

HEAD = ("--head", f"--port={GCS_PORT}", "--num-cpus=0", "--include-dashboard=false")
SERVE = str(Path(sys.executable).parent / "serve")
COMMAND = (sys.executable, "-m", "moa_ray.cli")


@contextmanager
def machines(number: int, **environment: str) -> Iterator[list[Machine]]:
    """So many, without Ray on them."""
    there: list[Machine] = []
    with network():
        try:
            for last in range(1, number + 1):
                there.append(Machine(last, {"RAY_AUTH_MODE": "disabled", **environment}))
            yield there
        finally:
            for machine in there:
                machine.remove()


def nodes(head: Machine) -> int:
    """How many live, the head among them."""
    try:
        status = get_cluster_status(f"{head.address}:{GCS_PORT}")
    except RpcError:  # there is no head, or it does not answer yet
        return 0
    return len(status.active_nodes) + len(status.idle_nodes)


def deploy(graph: Graph, head: Machine, beside: Machine, folder: Path) -> str:
    """`moa-ray deploy`, on the machine `beside`; where that one answers, which may be a moment later."""
    file = folder / "panel.yaml"
    file.write_text(yaml.safe_dump(graph.spec.model_dump(mode="json", exclude_unset=True)))
    address = f"{head.address}:{GCS_PORT}"
    beside.run(*COMMAND, "deploy", str(file), "--address", address, "--host", "0.0.0.0", "--no-auth")
    url = f"http://{beside.address}:8000"

    def ready() -> bool:
        try:
            return httpx2.get(f"{url}/ready").is_success
        except httpx2.HTTPError:
            return False

    until(ready, within_s=120)
    return url


def test_no_request_is_lost_while_the_heads_machine_is_dead_and_comes_back(folder: str, tmp_path: Path) -> None:
    storage = redis(OURS, 6379, folder)
    with machines(3, RAY_REDIS_ADDRESS=f"{OURS}:6379") as (head, one, two), storage:
        head.start_ray(folder, *HEAD)
        until(lambda: nodes(head) == 1, within_s=120)
        for worker in (one, two):
            worker.start_ray(folder, f"--address={head.address}:{GCS_PORT}", "--num-cpus=4")
        until(lambda: nodes(head) == 3, within_s=120)
        twice = {"replicas": 2, "resources": {"num_cpus": 1}}
        with Load(deploy(panel(dict.fromkeys(("a", "b", "chief"), twice)), head, one, tmp_path)) as load:
            load.goes_on()
            head.kill()
            load.goes_on(80)
            head.start_ray(folder, *HEAD)
            until(lambda: nodes(head) > 0, within_s=120)
            load.goes_on(40)
            one.run(*COMMAND, "scale", "panel", "a=3", "--address", f"{head.address}:{GCS_PORT}")
            load.goes_on()
        load.lost_nothing("the head's machine was dead for a while")


def test_machines_come_and_go_with_the_load(folder: str, tmp_path: Path) -> None:
    commands = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray")
    config = {
        **{f"{kind}_commands": [] for kind in commands},
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "upscaling_speed": 1.0,
        "cluster_name": "test",
        "max_workers": 3,
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"room": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 0.1,
    }
    (tmp_path / "autoscaler.json").write_text(json.dumps(config))
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    scaling = {"min": 1, "max": 3, "target_ongoing_requests": 1, "upscale_delay_s": 1, "downscale_delay_s": 1}
    graph = panel({"a": {"resources": {"custom": {"room": 1}}, "replicas": scaling}})
    with machines(1, **environment) as (head,):
        head.start_ray(folder, *HEAD, f"--autoscaling-config={tmp_path / 'autoscaler.json'}")
        until(lambda: nodes(head) == 1, within_s=120)
        # The nodes that come have the head's address: of several proxies, the kernel would choose.
        address = f"--address={head.address}:{GCS_PORT}"
        head.run(SERVE, "start", address, "--proxy-location=HeadOnly", "--http-host=0.0.0.0")
        with Load(deploy(graph, head, head, tmp_path)) as load:
            assert nodes(head) == 2
            until(lambda: nodes(head) == 4, within_s=120)
            load.goes_on()
        until(lambda: nodes(head) == 2, within_s=120)
    load.lost_nothing("nodes came and went with the load")
