"""Machines with addresses and processes of their own: namespaces on a bridge. That takes root."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.commands import ROOT

NETWORK = "10.213.77"
BRIDGE = "moa-bridge"
OURS = f"{NETWORK}.254"
"""This machine's address on the bridge."""
GCS_PORT = 6379


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@contextmanager
def network() -> Iterator[None]:
    """The bridge; tests that need it are skipped where it may not be made."""
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces take root: {error}")
    try:
        _ip("addr", "add", f"{OURS}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        yield
    finally:
        _ip("link", "del", BRIDGE)


class Machine:
    """A network namespace, in which processes find a machine of their own.

    Args:
        number: The last part of its address.
        environment: Variables of its processes.
    """

    def __init__(self, number: int, environment: Mapping[str, str]) -> None:
        self.name = f"moa-{number}"
        self.address = f"{NETWORK}.{number}"
        self._environment = {**os.environ, **environment}
        self._node: subprocess.Popen[bytes] | None = None
        inside = ["netns", "exec", self.name, "ip"]
        _ip("netns", "add", self.name)
        _ip("link", "add", self.name, "type", "veth", "peer", "eth0", "netns", self.name)
        _ip("link", "set", self.name, "master", BRIDGE, "up")
        _ip(*inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "route", "add", "default", "via", OURS)  # Ray takes the address that leads out for its own

    def start_ray(self, folder: str, *options: str) -> None:
        """Start a node of Ray; it stays in the background."""
        command = [str(Path(sys.executable).parent / "ray"), "start", f"--node-ip-address={self.address}", "--block"]
        command += [f"--temp-dir={folder}/{self.name}", "--object-store-memory=100000000", *options]
        apart = ["ip", "netns", "exec", self.name, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(f"{folder}/{self.name}.log", "a") as log:
            self._node = subprocess.Popen([*apart, *command], stdout=log, stderr=log, env=self._environment)

    def run(self, *command: str) -> str:
        """What `command` prints, run beside the node; bounded."""
        assert self._node is not None
        (first,) = psutil.Process(self._node.pid).children()
        done = subprocess.run(
            ["nsenter", f"--target={first.pid}", "--net", "--pid", "--mount", *command],
            capture_output=True,
            text=True,
            timeout=180,
            env=self._environment,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill(self) -> None:
        """SIGKILL of every process of the node, at once."""
        if self._node is not None:
            self._node.kill()
            self._node.wait(30)
            self._node = None

    def remove(self) -> None:
        """Kill it, and take its network away."""
        self.kill()
        _ip("link", "del", self.name)
        _ip("netns", "del", self.name)
