"""One Ray cluster for all tests of a worker that need one; such tests are marked `xdist_group("ray")`, which puts
them on the same worker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("moa-ray", deadline=None)  # a busy machine is no failure
settings.load_profile("moa-ray")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["MOA_RAY_RECORDS"] = "off"  # in this user's state folder; a test that wants records says where
# A shell that starts us in the background has us ignore interrupts, and our children with us.
signal.signal(signal.SIGINT, signal.default_int_handler)

EXAMPLES = Path(__file__).parent.parent / "examples"


HTTP_PORT = 8000 + 13 * (1 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))
"""Where the tests' Serve answers, a port for each worker."""


def until(condition: Callable[[], bool], *, within_s: float = 30) -> None:
    """Wait for what must become true; bounded."""
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, "it never became true"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with 2 CPUs and 8 pretended GPUs, joined by this process, Serve with HTTP on it."""
    import ray
    from ray import serve

    ray.init(address="local", num_cpus=2, num_gpus=8, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": HTTP_PORT})
    yield
    ray.shutdown()
