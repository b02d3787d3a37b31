"""A real Redis, out of Debian's package that `make setup` unpacks, or this machine's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.commands import ROOT
from tests.conftest import until

TOOLS = ROOT / ".tools" / "usr"


@contextmanager
def redis(host: str, port: int, folder: str) -> Iterator[str]:
    """Serve at `host:port`, which is yielded."""
    command = shutil.which("redis-server", path=str(TOOLS / "bin")) or shutil.which("redis-server")
    if command is None:
        pytest.skip("redis-server is not here; `make setup` fetches it where Debian's packages are")
    libraries = ":".join(str(path) for path in (TOOLS / "lib").glob("*-linux-gnu"))
    options = ["--bind", host, "--port", str(port), "--dir", folder, "--save", "", "--protected-mode", "no"]
    with open(f"{folder}/redis.log", "w") as log:
        server = subprocess.Popen([command, *options], stdout=log, env={**os.environ, "LD_LIBRARY_PATH": libraries})
    try:

        def answers() -> bool:
            with suppress(OSError):
                socket.create_connection((host, port), 1).close()
                return True
            return False

        until(answers, within_s=30)
        yield f"{host}:{port}"
    finally:
        server.kill()
        server.wait(10)
