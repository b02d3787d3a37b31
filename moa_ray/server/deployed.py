"""The HTTP edge in the cluster: its settings from where keys are kept, and an application out of a file.

The only module of this room that touches the cluster.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError
from ray.serve import Application

from moa_ray.cluster.app import build
from moa_ray.cluster.gateway import Http
from moa_ray.cluster.session import Listen
from moa_ray.engines import registry as engine_kinds
from moa_ray.errors import SpecError
from moa_ray.gates import registry as gate_kinds
from moa_ray.graph import Graph, from_dict
from moa_ray.graph.source import Source
from moa_ray.server.app import create_app
from moa_ray.server.settings import KEYS, ServerSettings

KEYS_FILE = "MOA_RAY_API_KEYS_FILE"
_MAX_KEYS_BYTES = 1_000_000


def http(settings: ServerSettings) -> Http:
    """The gateways that serve with `settings`."""
    return Http(create_app, settings, settings.gateways, settings.feedback)


def api_keys(file: Path | None = None) -> tuple[SecretStr, ...]:
    """Keys in `file` and in `$MOA_RAY_API_KEYS_FILE`, one a line, and in `$MOA_RAY_API_KEYS`, between commas.

    Raises:
        SpecError: If a file cannot be read or holds none, or a key is not printable ASCII.
    """
    keys = re.split(r"[\s,]+", os.environ.get(KEYS, "").strip())
    named = os.environ.get(KEYS_FILE)
    for path in filter(None, (file, Path(named) if named else None)):
        keys += _keys_of(path)
    for number, key in enumerate(keys := list(dict.fromkeys(filter(None, keys))), start=1):
        if not re.fullmatch(r"[\x21-\x7e]+", key):
            raise SpecError(f"API key number {number} has characters that no header may have")
    return tuple(map(SecretStr, keys))


def _keys_of(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_KEYS_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not text"
        raise SpecError(f"the API keys cannot be read: {reason}", file=str(path)) from None
    if keys := [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]:
        return keys
    raise SpecError("the file holds no API key", file=str(path), hint="one key a line")


def unique(graphs: Sequence[Graph]) -> Sequence[Graph]:
    """`graphs`, if each is a model of its own name.

    Raises:
        SpecError: If two have the same name.
    """
    names = [graph.spec.name for graph in graphs]
    for graph in graphs:
        if names.count(graph.spec.name) > 1:
            raise graph.source.error(("name",), f"several graphs are called {graph.spec.name!r}", hint="rename one")
    return graphs


# ---------------------------------------------------------------- for `serve deploy`


class _Args(BaseModel):
    """Arguments of `application`."""

    model_config = ConfigDict(extra="forbid")

    graphs: list[dict[str, Any]]
    host: str = "127.0.0.1"
    server: dict[str, Any] = {}


def application(args: Mapping[str, Any]) -> Application:
    """Serve's builder, the `import_path` of `config`: `{graphs: [spec, …], host: …, server: {…}}`.

    API keys are taken from the environment where this runs, as `api_keys` says.

    Raises:
        SpecError: If the arguments do not describe graphs, or the host is open to others and there is no key.
    """
    try:
        given = _Args.model_validate(dict(args))
        settings = ServerSettings.model_validate({**given.server, "api_keys": api_keys()})
    except ValidationError as error:
        raise Source().invalid((), error, ServerSettings if error.title == "ServerSettings" else _Args) from None
    if not settings.api_keys and not Listen(given.host).local:
        raise SpecError(f"at {given.host} anybody could ask", hint=f"set {KEYS} where Ray's head runs")
    graphs = unique([from_dict(spec) for spec in given.graphs])
    for graph in graphs:
        engine_kinds.check(graph)
        gate_kinds.check(graph)
    return build(graphs, http(settings))


def config(
    specs: Sequence[Mapping[str, Any]], app: str, route_prefix: str, listen: Listen, settings: ServerSettings
) -> str:
    """A file for `serve deploy` that brings up what `moa-ray deploy` would.

    Args:
        specs: The graphs as written, secrets still by name.
        app: Name of the application.
        route_prefix: Where it answers.
        listen: Where the proxies listen.
        settings: Of the gateway; keys are left out.
    """
    server = settings.model_dump(mode="json", exclude={"api_keys"}, exclude_defaults=True)
    content = {
        "proxy_location": "EveryNode",
        "http_options": {"host": listen.host, "port": listen.port},
        "applications": [
            {
                "name": app,
                "route_prefix": route_prefix,
                "import_path": f"{__name__}:{application.__name__}",
                "args": {"graphs": [dict(spec) for spec in specs], "host": listen.host, "server": server},
            }
        ],
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
