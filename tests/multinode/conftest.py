"""Real Ray nodes on this machine: a head, and as many others as a test adds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
from ray import serve
from ray.cluster_utils import Cluster

from moa_ray.cluster import Session
from tests.http import free_port
from tests.multinode.redis import redis


@pytest.fixture(scope="session")
def folder() -> Iterator[str]:
    """Where Ray keeps its sockets and logs; their paths must be short."""
    with tempfile.TemporaryDirectory(prefix="moa-", ignore_cleanup_errors=True) as path:
        yield path


@pytest.fixture(scope="module")
def cluster(folder: str) -> Iterator[Cluster]:
    """A head that this process has joined, its state in Redis; and Serve with HTTP at the head alone.

    All nodes have one address here: of several proxies at one port, the kernel would choose, and one would die.
    """
    with redis("127.0.0.1", free_port(), folder) as storage, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_REDIS_ADDRESS", storage)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            with Session(cluster.address, start_serve=False):
                port = free_port()
                serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
                yield cluster
                serve.shutdown()
        finally:
            cluster.shutdown()
