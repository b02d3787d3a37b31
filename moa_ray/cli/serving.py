"""`moa-ray serve`, `deploy`, `status`, `scale`, `delete`: graphs as models behind HTTP."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_urlsafe
from threading import Event
from typing import Any

import typer
import yaml
from pydantic import SecretStr, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from moa_ray.cli.session import fetch_models, progress
from moa_ray.cluster import Session, operate
from moa_ray.cluster.deploy import deploy as deploy_app
from moa_ray.cluster.operate import AppStatus, EngineStatus, GateStatus
from moa_ray.cluster.session import Listen
from moa_ray.errors import RequestError
from moa_ray.graph import Graph, Source
from moa_ray.graph.spec import Autoscaling
from moa_ray.server import ServerSettings, kuberay
from moa_ray.server.deployed import api_keys, config, http, unique
from moa_ray.server.settings import KEYS


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be served, where and how."""

    graphs: Sequence[Graph]
    app: str
    route_prefix: str
    listen: Listen
    settings: ServerSettings
    generated_key: str = ""

    @property
    def url(self) -> str:
        """Base URL of the OpenAI interface, for a caller on this machine."""
        return f"{self.listen.url}{self.route_prefix.rstrip('/')}/v1"


def plan(
    graphs: Sequence[Graph],
    app: str | None,
    listen: Listen,
    route_prefix: str,
    keys_file: Path | None,
    open_to_all: bool,
    settings: Sequence[str],
) -> Plan:
    """Check what was asked; beyond loopback there is always a key, if need be a new one.

    Raises:
        SpecError: For settings and keys that are wrong, and graphs of one name.
        RequestError: For a path that cannot be served.
    """
    if not re.fullmatch(r"/[\w./-]*", route_prefix):
        raise RequestError(f"--route-prefix {route_prefix!r}: begin with a slash; letters, digits, `-`, `_`, `.`, `/`")
    keys = () if open_to_all else api_keys(keys_file)
    generated = "" if keys or open_to_all or listen.local else f"sk-moa-{token_urlsafe(24)}"
    server = _settings(settings).model_copy(update={"api_keys": (SecretStr(generated),) if generated else keys})
    return Plan(graphs, app or unique(graphs)[0].spec.name, route_prefix, listen, server, generated)


def _settings(given: Sequence[str]) -> ServerSettings:
    values: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise RequestError(f"--set {text!r} is not KEY=VALUE")
        many = key == "cors_origins"
        values[key] = value.split(",") if many else yaml.safe_load(value)
    if "api_keys" in values:
        raise RequestError("--set api_keys: anybody who lists processes would see them", hint=f"set {KEYS}")
    try:
        return ServerSettings.model_validate(values)
    except ValidationError as error:
        raise Source("--set").invalid((), error, ServerSettings) from None


def serve(plan: Plan, *, address: str | None) -> None:
    """Serve until interrupted; take down what was started."""
    with _deployed(plan, address) as session:
        _announce(plan)
        typer.echo("Ctrl-C stops it.", err=True)
        _until_told_to_stop()
        typer.echo("stopping…", err=True)
        if not session.owned:
            operate.delete(plan.app)


def deploy(plan: Plan, *, address: str | None) -> None:
    """Deploy, or update what is there, and leave it running."""
    with _deployed(plan, address or "auto"):
        _announce(plan)


def dry_run(plan: Plan, specs: Sequence[Path]) -> None:
    """Print the file that `serve deploy` takes in place of `deploy`."""
    typer.echo(config(_written(specs), plan.app, plan.route_prefix, plan.listen, plan.settings), nl=False)


def kuberay_file(plan: Plan, specs: Sequence[Path], *, image: str, redis: str) -> None:
    """Print the file that `kubectl apply` takes in place of `deploy`."""
    written = _written(specs)
    serve_config = config(written, plan.app, plan.route_prefix, Listen("0.0.0.0", kuberay.PORT), plan.settings)
    typer.echo(kuberay.manifests(plan.graphs, written, plan.app, serve_config, image=image, redis=redis), nl=False)


def _written(specs: Sequence[Path]) -> list[Any]:
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in specs]


@contextmanager
def _deployed(plan: Plan, address: str | None) -> Generator[Session, None, None]:
    if address is None:
        for graph in plan.graphs:
            fetch_models(graph)
    with progress() as show, Session(address, plan.listen) as session:
        deploy_app(
            plan.graphs,
            plan.app,
            http=http(plan.settings),
            route_prefix=plan.route_prefix,
            may_grow=session.grows,
            progress=show,
        )
        show.stop()
        yield session


def _announce(plan: Plan) -> None:
    models = [graph.spec.name for graph in plan.graphs]
    key = plan.generated_key or ("$KEY" if plan.settings.api_keys else "")
    header = f" -H 'Authorization: Bearer {key}'" if key else ""
    body = json.dumps({"model": models[0], "messages": [{"role": "user", "content": "Why is the sky blue?"}]})
    typer.echo(f"{', '.join(models)} at {plan.url}")
    if plan.generated_key:
        typer.echo(f"API key (not shown again; set {KEYS} for one of your own): {plan.generated_key}")
    typer.echo(f"\n  curl {plan.url}/chat/completions{header} -H 'Content-Type: application/json' -d '{body}'\n")


def _until_told_to_stop() -> None:
    told = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    while not told.wait(1.0):  # a wait without end would not let the handler run
        pass


# ---------------------------------------------------------------- looking and scaling

_ROOMY = 110
"""Columns of a terminal that has room for the models' names."""


def status(app: str | None, *, address: str | None, as_json: bool) -> None:
    """Print how the applications are."""
    with Session(address or "auto", start_serve=False):
        found = operate.status(app)
    if as_json:
        typer.echo(json.dumps([_json(each) for each in found], ensure_ascii=False))
        return
    if not found:
        typer.echo("nothing of moa-ray runs on this cluster")
    for each in found:
        console = Console(highlight=False)
        console.print(_table(each, with_models=console.width >= _ROOMY))
        for gate in each.gates:
            console.print(_gate_table(gate))
        if each.message:
            typer.echo(each.message.strip())


def _json(app: AppStatus) -> dict[str, Any]:
    return {
        "app": app.app,
        "state": app.state,
        "route_prefix": app.route_prefix,
        "message": app.message,
        "engines": [
            {
                "graph": engine.graph,
                "engine": engine.engine,
                "kind": engine.kind,
                "model": engine.model,
                "replicas": {"wanted": engine.wanted, "alive": engine.alive},
                "gpus": engine.gpus,
                "ongoing": engine.load.ongoing,
                "queued": engine.queued,
                "hint": {"replicas": engine.hint},
                "failed": engine.load.failed,
                "calls_per_s": round(engine.load.calls_per_s, 3),
                "p50_s": _rounded(engine.load.percentile(50)),
                "p95_s": _rounded(engine.load.percentile(95)),
            }
            for engine in app.engines
        ],
        "gates": [
            {
                "graph": gate.graph,
                "kind": gate.kind,
                "requests": gate.load.requests,
                "failed": gate.load.failed,
                "importance": {agent: round(value, 3) for agent, value in gate.load.importance.items()},
                "load": dict(gate.load.load),
                "cv_importance": round(gate.load.cv_importance, 3),
                "cv_load": round(gate.load.cv_load, 3),
                "max_over_mean_load": round(gate.load.max_over_mean_load, 3),
            }
            for gate in app.gates
        ],
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _table(app: AppStatus, *, with_models: bool) -> Table:
    where = f" at {app.route_prefix}" if app.route_prefix else ""
    title = f"{app.app}: {app.state.lower()}{where}; calls of the last minute"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("engine", no_wrap=True)
    if with_models:
        table.add_column("model", overflow="fold")
    for name in ("up", "hint", "GPUs", "calls", "queued", "failed", "per s", "p50 s", "p95 s"):
        table.add_column(name, justify="right", no_wrap=True)
    for engine in app.engines:
        table.add_row(*_row(engine, with_model=with_models))
    return table


def _gate_table(gate: GateStatus) -> Table:
    load = gate.load
    title = (
        f"gate of {gate.graph} ({gate.kind}): {load.requests} requests, {load.failed} without it; CV of importance "
        f"{load.cv_importance:.2f}, of load {load.cv_load:.2f}, max/mean {load.max_over_mean_load:.2f}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("agent", no_wrap=True)
    for name in ("importance", "load"):
        table.add_column(name, justify="right", no_wrap=True)
    for agent, count in load.load.items():
        table.add_row(agent, f"{load.importance[agent]:.2f}", str(count))
    return table


def _row(engine: EngineStatus, *, with_model: bool) -> list[str]:
    load = engine.load
    up = f"{engine.alive}/{engine.wanted}"
    return [
        f"{engine.graph}/{engine.engine}",
        *([engine.model] if with_model else []),
        f"[red]{up}[/]" if engine.alive < engine.wanted else up,
        str(engine.hint),
        f"{engine.gpus:g}",
        str(load.ongoing),
        str(engine.queued),
        str(load.failed),
        f"{load.calls_per_s:.2f}",
        *("–" if (s := load.percentile(percent)) is None else f"{s:.2f}" for percent in (50, 95)),
    ]


def scale(app: str, wanted: Sequence[str], *, address: str | None) -> None:
    """Change numbers of replicas."""
    replicas = dict(map(_wanted, wanted))
    with Session(address or "auto", start_serve=False):
        operate.scale(app, replicas)
    typer.echo(f"{app}: {', '.join(wanted)}")


def _wanted(text: str) -> tuple[str, int | Autoscaling]:
    found = re.fullmatch(r"([^=]+)=(\d{1,6})(?:\.\.(\d{1,6}))?", text)
    if not found:
        raise RequestError(f"{text!r} is not ENGINE=N", hint="write smol=3, or smol=1..8 to follow the load")
    engine, low, high = found[1], int(found[2]), found[3]
    if high is not None:
        if int(high) < max(low, 1):
            raise RequestError(f"{text}: {high} is less than {max(low, 1)}")
        return engine, Autoscaling(min=low, max=int(high))
    if low < 1:
        raise RequestError(f"{text}: at least one replica", hint=f"{engine}=0..1 lets it go when it is idle")
    return engine, low


def delete(app: str, *, address: str | None) -> None:
    """Take an application down."""
    with Session(address or "auto", start_serve=False):
        operate.delete(app)
    typer.echo(f"{app} is gone")
