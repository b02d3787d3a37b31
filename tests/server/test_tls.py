"""The TLS example in `deployments`, in real Caddy with a real client."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest
from pydantic import SecretStr

from moa_ray.client import Client
from moa_ray.errors import ServerUnreachable
from moa_ray.server import ServerSettings
from tests.commands import ROOT, tool
from tests.conftest import until
from tests.http import free_port
from tests.server.local import serving

ON_LOOPBACK = """{{
	admin off
	default_bind 127.0.0.1
	http_port {port}
	skip_install_trust
}}
import {file}
"""


@contextmanager
def caddy(folder: Path, upstream: str) -> Iterator[tuple[str, Path]]:
    """The example in front of `upstream`: its URL, and the certificate of who signed it."""
    port = free_port()
    config = folder / "Caddyfile"
    config.write_text(ON_LOOPBACK.format(port=free_port(), file=ROOT / "deployments" / "tls" / "Caddyfile"))
    site = {"MOA_RAY_SITE": f"localhost:{port}", "MOA_RAY_UPSTREAM": upstream}
    environment = {**os.environ, **site, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    command = [tool("caddy"), "run", "--config", str(config), "--adapter", "caddyfile"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"https://localhost:{port}", folder / "caddy" / "pki" / "authorities" / "local" / "root.crt"
        finally:
            process.terminate()
            process.wait(20)


def test_a_stream_comes_through_tls_piece_by_piece_and_nobody_else_is_trusted(tmp_path: Path) -> None:
    settings = ServerSettings(api_keys=(SecretStr("sk-one"),))
    with (
        serving(2, settings=settings, itl_s=0.05, reply_tokens=30) as served,
        caddy(tmp_path, served.url.removeprefix("http://")) as (url, authority),
    ):
        until(authority.exists)
        trusting = ssl.create_default_context(cafile=authority)

        def up() -> bool:
            try:
                return httpx2.get(f"{url}/health", verify=trusting).status_code == 200
            except httpx2.TransportError:
                return False

        until(up)
        with httpx2.Client(verify=trusting) as http:
            assert http.get(f"{url}/v1/models").status_code == 401
            headers = {"authorization": "Bearer sk-one"}
            body = {"model": "panel", "messages": [{"role": "user", "content": "why?"}], "stream": True}
            with http.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response:
                assert response.headers["strict-transport-security"]
                still_writing = [bool(served.engine.active) for line in response.iter_lines() if '"content"' in line]
            assert len(still_writing) > 5 and still_writing[0]
        assert openai.OpenAI(
            base_url=f"{url}/v1", api_key="sk-one", http_client=openai.DefaultHttpxClient(verify=trusting)
        ).models.list()
        with pytest.raises(ServerUnreachable, match="certificate"):
            Client(f"{url}/v1", api_key="sk-one", retries=0).run("why?")
