"""Being on a Ray cluster: join a running one, or start a local one; take down only what was started here."""

from __future__ import annotations

import logging
import os
import socket
from types import TracebackType
from urllib.parse import urlsplit

import ray
from ray import serve

from moa_ray.errors import ClusterError, SpecError

_CONNECT_TIMEOUT_S = 5.0


class Session:
    """A connection of this process to a Ray cluster, with Serve running on it.

    Args:
        address: `host:port` of a running cluster's GCS, `auto` for the one on this machine, or None: the
            environment variable `RAY_ADDRESS`, and where that is not set, a local cluster of our own.

    Attributes:
        owned: Whether this session started the cluster, and so will stop it.

    Raises:
        ClusterError: If the cluster cannot be reached within seconds, or refuses us.
    """

    def __init__(self, address: str | None = None) -> None:
        _quiet()
        self._joined_before = ray.is_initialized()
        wanted = address or os.environ.get("RAY_ADDRESS") or "local"
        self.owned = wanted == "local" and not self._joined_before
        if not self._joined_before:
            _init(wanted)
        # Engines are reached through handles; whoever wants HTTP starts it with the server.
        serve.start(proxy_location="Disabled")

    def close(self) -> None:
        """Leave the cluster, and stop it if this session started it. Safe to call twice."""
        if ray.is_initialized() and not self._joined_before:
            ray.shutdown()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _init(address: str) -> None:
    if address != "local":
        _check_reachable(address)
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")  # a refused token is told once, by us
    local = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **local)
    except Exception as error:  # Ray raises bare Exceptions here
        ray.shutdown()
        reason = str(error).strip().splitlines()[0]
        if address == "local":
            raise ClusterError(
                f"a local Ray cluster did not start: {reason}", hint="`ray stop` ends leftovers"
            ) from error
        raise ClusterError(
            f"cannot join the Ray cluster at {address}: {reason}",
            hint="check --address or RAY_ADDRESS, the cluster's Ray version, and its token (RAY_AUTH_TOKEN)",
        ) from error


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
