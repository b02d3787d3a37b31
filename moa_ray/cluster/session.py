"""Being on a Ray cluster: join a running one, or start a local one; take down only what was started here."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import serve
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status

from moa_ray.errors import ClusterError, SpecError

_CONNECT_TIMEOUT_S = 5.0
_OF_OUR_OWN_CLUSTER = {
    # One event loop in each replica instead of three, and gRPC between replicas: half the CPU of a request.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # The proxies' calls, too, which Ray 2.60 forgets; and room for an answer that is larger than gRPC's 4 MiB.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 1024 * 1024),
    # Each process would write its metrics ten times a second, for scrapers that come every few seconds.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    # It would have each gateway answer at a port of its own, too.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    # Serve kills an HTTP proxy that takes longer to start than this, and gives up; 5 s is short on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""How Serve runs in the processes of a cluster that is ours. What the environment says already goes first."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the cluster's HTTP proxies listen."""

    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """The base URL for a caller on this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


class Session:
    """A connection of this process to a Ray cluster, with Serve running on it.

    Args:
        address: `host:port` of a running cluster's GCS, `auto` for the one on this machine, or None: the
            environment variable `RAY_ADDRESS`, and where that is not set, a local cluster of our own.
        listen: Where HTTP is to be answered; None for handles alone.
        start_serve: Whether Serve is started where it does not run yet.

    Attributes:
        owned: Whether this session started the cluster, and so will stop it.

    Raises:
        ClusterError: If the cluster cannot be reached within seconds, or refuses us, or HTTP cannot be answered
            where it is wanted.
    """

    def __init__(self, address: str | None = None, listen: Listen | None = None, *, start_serve: bool = True) -> None:
        _quiet()
        self._joined_before = ray.is_initialized()
        wanted = address or os.environ.get("RAY_ADDRESS") or "local"
        self.owned = wanted == "local" and not self._joined_before
        if self.owned and listen:
            _check_free(listen)
        if not self._joined_before:
            _init(wanted)
        try:
            self._serve_was_there = _serve_runs() or not start_serve
            if start_serve:
                _start_serve(listen)
        except BaseException:
            self.close()
            raise

    @property
    def grows(self) -> bool:
        """Whether the cluster may get nodes by itself: Ray's autoscaler (v2, as with `ray up` and KubeRay) runs."""
        return cluster_status().stats.autoscaler_version not in (None, "0")

    def close(self) -> None:
        """Leave the cluster, and stop what this session started: the cluster, or Serve. Safe to call twice."""
        if not ray.is_initialized():
            return
        if not self.owned and not self._serve_was_there and not serve.status().applications:
            serve.shutdown()
        if not self._joined_before:
            ray.shutdown()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve_runs() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _start_serve(listen: Listen | None) -> None:
    if listen is None:
        serve.start(proxy_location="Disabled")
        return
    serve.start(proxy_location="EveryNode", http_options={"host": listen.host, "port": listen.port})
    # Where Serve runs already, it keeps what it was started with.
    details = serve_details()
    given = details["http_options"]
    if details["proxy_location"] == "Disabled":
        raise ClusterError("Ray Serve runs without HTTP on this cluster", hint="`serve shutdown -y` ends it")
    if (given["host"], given["port"]) != (listen.host, listen.port):
        raise ClusterError(
            f"Ray Serve answers at {given['host']}:{given['port']} on this cluster, not at {listen.host}:{listen.port}",
            hint=f"use --host {given['host']} --port {given['port']}, or end Serve with `serve shutdown -y`",
        )


def serve_details() -> dict[str, Any]:
    """Serve's own account of itself; no applications where it does not run."""
    # Serve's public status does not tell a replica that waits for a node from one that loads its model.
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    details: dict[str, Any] = client.get_serve_details() if client else {"applications": {}}
    return details


def details_of(app: str) -> dict[str, Any]:
    """Serve's own account of one application; empty where it is not there."""
    details: dict[str, Any] = serve_details()["applications"].get(app, {})
    return details


def _check_free(listen: Listen) -> None:
    try:
        socket.create_server((listen.host, listen.port)).close()
    except OSError as error:
        raise ClusterError(
            f"cannot listen at {listen.host}:{listen.port}: {error.strerror or error}", hint="choose another --port"
        ) from error


def _init(address: str) -> None:
    if address != "local":
        _check_reachable(address)
    local = {"include_dashboard": False} if address == "local" else {}
    try:
        with _without_stderr(), _inherited(_OF_OUR_OWN_CLUSTER if local else {}):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **local)
    except Exception as error:  # Ray raises bare Exceptions here
        ray.shutdown()
        reason = str(error).strip().splitlines()[0]
        if address == "local":
            raise ClusterError(
                f"a local Ray cluster did not start: {reason}", hint="`ray stop` ends leftovers"
            ) from error
        if address == "auto" and isinstance(error, ConnectionError):
            raise ClusterError(
                "no Ray cluster runs on this machine",
                hint="`ray start --head` starts one; or name one by --address or RAY_ADDRESS",
            ) from error
        raise ClusterError(
            f"cannot join the Ray cluster at {address}: {reason}",
            hint="check --address or RAY_ADDRESS, the cluster's Ray version, and its token (RAY_AUTH_TOKEN)",
        ) from error


@contextmanager
def _inherited(variables: Mapping[str, str]) -> Generator[None, None, None]:
    """For processes started meanwhile; Serve in this one has read its own already, and needs loops of its own here."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


@contextmanager
def _without_stderr() -> Generator[None, None, None]:
    """Ray's C++ side writes there what its exception tells as well, such as a refused token, over many lines."""
    if os.environ.get("MOA_RAY_LOG") == "debug":
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_reachable(address: str) -> None:
    """Ray waits minutes for an address that nobody serves, and then ends the process; ask first."""
    if address == "auto":
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise SpecError(f"{address!r} is no address of a Ray cluster", hint="write host:port, such as 127.0.0.1:6379")
    try:
        socket.create_connection((host, port), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {error.strerror or error}",
            hint="start one with `ray start --head`, or leave out --address to start a local one",
        ) from error


def _quiet() -> None:
    """Ray's and Serve's progress lines are not ours to print; `MOA_RAY_LOG=debug` lets them through."""
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a FutureWarning of Ray's
    if os.environ.get("MOA_RAY_LOG") != "debug":
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)


def cluster_status() -> ClusterStatus:
    """What Ray's autoscaler knows of the cluster that is joined."""
    return get_cluster_status(ray.get_runtime_context().gcs_address)
