"""A real Redis, out of Debian's package that `make setup` unpacks, or this machine's."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.commands import ROOT, tool
from tests.conftest import until


@contextmanager
def redis(host: str, port: int, folder: str) -> Iterator[str]:
    """Serve at `host:port`, which is yielded."""
    command = tool("redis-server")
    libraries = ":".join(str(path) for path in (ROOT / ".tools" / "usr" / "lib").glob("*-linux-gnu"))
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
