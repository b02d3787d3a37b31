"""The commands of `moa-ray`. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from moa_ray import __version__
from moa_ray.cli import bench, evaluation, export, gate, models, moe, output, plugins, runs
from moa_ray.cli.options import Address, AsJson
from moa_ray.engines import registry as engine_kinds
from moa_ray.errors import MoARayError
from moa_ray.gates import registry as gate_kinds
from moa_ray.graph import Graph, draw, json_schema, load

app = typer.Typer(
    name="moa-ray",
    help="One model out of many, on Ray.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(models.app, name="models")
app.add_typer(moe.app, name="moe")
app.add_typer(gate.app, name="gate")
app.add_typer(runs.app, name="runs")
app.command()(bench.bench)
app.command()(export.export)
app.command()(plugins.plugins)
app.command("eval")(evaluation.evaluate)
app.command("tune")(evaluation.tune)

Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="The graph's YAML file.", show_default=False)]

IMAGE = f"moa-ray:{__version__}"
"""What `deployments/Containerfile` is built as."""

_EXTRA_OF = {"torch": "moe", "safetensors": "moe", "matplotlib": "moe", "numpy": "gate", "datasets": "eval"}
"""Extra of the package that brings a module."""
_EXTRA_OF_COMMAND = {"eval": "eval", "tune": "eval"}
"""Where several extras bring it: that of the command."""


class Picture(StrEnum):
    """Forms in which `moa-ray graph` draws."""

    terminal = "terminal"
    mermaid = "mermaid"
    svg = "svg"


class Target(StrEnum):
    """Where `moa-ray deploy` deploys to."""

    ray = "ray"
    kuberay = "kuberay"


def main() -> None:
    """Entry point: errors of ours become one clear line and their exit code."""
    try:
        app()
    except MoARayError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        extra = _EXTRA_OF_COMMAND.get(sys.argv[1], extra)
        _fail(MoARayError(f"{error.name} is not installed", hint=f"pip install 'moa-ray[{extra}]'"))
    except BrokenPipeError:  # the reader of our stdout left, as `head` does
        sys.stderr.close()
        sys.exit(1)


def _fail(error: MoARayError) -> NoReturn:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/] {_escaped(error.message)}")
    if error.hint:
        console.print(f"[dim]hint:[/]  {_escaped(error.hint)}")
    sys.exit(error.exit_code)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moa-ray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    spec: Spec,
    prompt: Annotated[str, typer.Argument(help="The question; `-` reads it from stdin.", show_default=False)],
    address: Address = None,
    as_json: AsJson = False,
    timeline: Annotated[bool, typer.Option("--timeline", help="Show what each call did when.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--timeline-svg", help="Write the timeline to this file.", show_default=False)
    ] = None,
) -> None:
    """Answer one PROMPT: each agent's text as it comes, the answer, and a table of what it took."""
    from moa_ray.cli import session

    asked = sys.stdin.read() if prompt == "-" else prompt
    session.run(_checked(spec), asked, address=address, as_json=as_json, timeline=timeline, svg=svg)


@app.command()
def chat(spec: Spec, address: Address = None) -> None:
    """Talk with the graph; Ctrl-C stops an answer, Ctrl-D leaves."""
    from moa_ray.cli import session

    session.chat(_checked(spec), address=address)


@app.command()
def batch(
    spec: Spec,
    source: Annotated[Path, typer.Argument(metavar="IN", help='JSON lines with "prompt" or "messages".')],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="JSON lines, an answer each.")],
    concurrency: Annotated[int, typer.Option(help="Requests in flight at once.", min=1)] = 16,
    address: Address = None,
) -> None:
    """Answer every line of IN in OUT, once; the same command goes on where it was stopped or killed."""
    from moa_ray.cli import batch as batches

    batches.run(_checked(spec), source, target, concurrency=concurrency, address=address)


Specs = Annotated[list[Path], typer.Argument(metavar="SPEC...", help="The graphs' YAML files, a model each.")]
App = Annotated[str, typer.Argument(metavar="APP", help="Name of the application.", show_default=False)]
Running = Annotated[
    str | None,
    typer.Option(help="The Ray cluster, host:port; this machine's where not given.", envvar="RAY_ADDRESS"),
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the application; the first graph's by default.")]
Prefix = Annotated[str, typer.Option("--route-prefix", help="Path under which it answers.")]
Host = Annotated[str, typer.Option(help="Address to listen at; beyond loopback an API key is needed.")]
Port = Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)]
KeysFile = Annotated[
    Path | None,
    typer.Option("--api-keys-file", help="API keys, one a line; MOA_RAY_API_KEYS holds more, between commas."),
]
NoAuth = Annotated[bool, typer.Option("--no-auth", help="Ask for no API key, wherever it listens.")]
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the server, such as max_queued=64 or drafts=true."),
]


@app.command()
def serve(
    specs: Specs,
    address: Address = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    route_prefix: Prefix = "/",
    api_keys_file: KeysFile = None,
    no_auth: NoAuth = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Serve graphs as OpenAI models over HTTP, until Ctrl-C."""
    from moa_ray.cli import serving
    from moa_ray.cluster.session import Listen

    graphs = [_checked(spec) for spec in specs]
    plan = serving.plan(graphs, name, Listen(host, port), route_prefix, api_keys_file, no_auth, settings)
    serving.serve(plan, address=address)


@app.command()
def deploy(
    specs: Specs,
    address: Running = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the file for `serve deploy`, do nothing.")] = False,
    target: Annotated[
        Target, typer.Option(help="Where to; for `kuberay`, print the file for `kubectl apply`.")
    ] = Target.ray,
    image: Annotated[str, typer.Option(help="Container image of KubeRay's pods.")] = IMAGE,
    redis: Annotated[str, typer.Option(help="HOST:PORT of a Redis that keeps the state of KubeRay's head.")] = "",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    route_prefix: Prefix = "/",
    api_keys_file: KeysFile = None,
    no_auth: NoAuth = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Deploy graphs to a running cluster, or update what is there without losing a request."""
    from moa_ray.cli import serving
    from moa_ray.cluster.session import Listen

    graphs = [_checked(spec) for spec in specs]
    plan = serving.plan(graphs, name, Listen(host, port), route_prefix, api_keys_file, no_auth, settings)
    if target is Target.kuberay:
        serving.kuberay_file(plan, specs, image=image, redis=redis)
    elif dry_run:
        serving.dry_run(plan, specs)
    else:
        serving.deploy(plan, address=address)


@app.command()
def status(
    app: Annotated[str | None, typer.Argument(metavar="[APP]", help="Only this one.", show_default=False)] = None,
    address: Running = None,
    as_json: AsJson = False,
) -> None:
    """Show every engine of what is deployed: replicas, GPUs, load, latency."""
    from moa_ray.cli import serving

    serving.status(app, address=address, as_json=as_json)


@app.command()
def scale(
    app: App,
    engines: Annotated[
        list[str], typer.Argument(metavar="ENGINE=N...", help="Replicas wanted; ENGINE=1..8 follows the load.")
    ],
    address: Running = None,
) -> None:
    """Change the replicas of engines; nothing else moves, and no request is lost."""
    from moa_ray.cli import serving

    serving.scale(app, engines, address=address)


@app.command()
def delete(app: App, address: Running = None) -> None:
    """Take an application down."""
    from moa_ray.cli import serving

    serving.delete(app, address=address)


@app.command()
def validate(spec: Spec, as_json: AsJson = False) -> None:
    """Check a SPEC without running it."""
    graph = _checked(spec)
    summary = {
        "name": graph.spec.name,
        "layers": graph.depth,
        "agents": len(graph.spec.agents),
        "engines": len(graph.engines),
        "calls": len(graph.calls) + (graph.answer is not None),
    }
    if as_json:
        typer.echo(json.dumps({"valid": True, **summary}))
    else:
        counts = ", ".join(f"{n} {name if n != 1 else name[:-1]}" for name, n in summary.items() if name != "name")
        typer.echo(f"{spec}: ok: {summary['name']}: {counts} a request")


@app.command()
def graph(
    spec: Spec,
    form: Annotated[Picture, typer.Option("--format", "-f", help="How to draw.")] = Picture.terminal,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file.", show_default=False)] = None,
) -> None:
    """Draw the DAG of a SPEC: in the terminal, as Mermaid, or as SVG."""
    picture = getattr(draw, form.value)(_checked(spec))
    if out is None:
        typer.echo(picture)
    else:
        output.write("--out", out, picture)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a SPEC, for editors."""
    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _checked(spec: Path) -> Graph:
    graph = load(spec)
    engine_kinds.check(graph)
    gate_kinds.check(graph)
    return graph
