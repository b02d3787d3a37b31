"""`moa-ray runs`: what was recorded of runs, by `run`, `chat` and servers on this machine; no logic."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moa_ray.cli.options import AsJson
from moa_ray.errors import RequestError

if TYPE_CHECKING:
    from moa_ray.runtime.records import Records

app = typer.Typer(help="Look at runs that were recorded.", no_args_is_help=True)

File = Annotated[
    Path | None, typer.Option("--file", help="The records; $MOA_RAY_RECORDS or this user's where not given.")
]
Run = Annotated[str, typer.Argument(help="The run's id, or how it begins, or `last`.")]


@app.command("list")
def list_(
    graph: Annotated[str, typer.Option(help="Only runs of this graph.")] = "",
    count: Annotated[int, typer.Option(help="So many, the latest.", min=1)] = 20,
    as_json: AsJson = False,
    file: File = None,
) -> None:
    """Show the latest runs."""
    rows = _records(file).latest(count, graph)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(asdict(row), ensure_ascii=False))
        return
    from rich.console import Console

    from moa_ray.cli.recorded import table

    Console(highlight=False).print(table(rows))


@app.command()
def show(
    run: Run,
    timeline: Annotated[bool, typer.Option("--timeline", help="And what each call did when.")] = False,
    file: File = None,
) -> None:
    """Show a RUN: the question, the answer, and what each agent took."""
    from moa_ray.cli import recorded

    row, events = _records(file).find(run)
    recorded.show(row, events, events, timeline=timeline)


@app.command()
def replay(
    run: Run,
    speed: Annotated[float, typer.Option(help="Times as fast as it was.", min=0.01)] = 1.0,
    file: File = None,
) -> None:
    """Show a RUN as it went, in its own time."""
    from moa_ray.cli import recorded

    row, events = _records(file).find(run)
    recorded.show(row, events, recorded.in_time(events, speed))


@app.command()
def export(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN...]", help="All where not given.")] = None,
    file: File = None,
) -> None:
    """Print the events of runs, one JSON object a line, as `moa-ray run --json` does."""
    for line in _records(file).lines(runs or []):
        typer.echo(line)


def _records(file: Path | None) -> Records:
    from moa_ray.runtime.records import VARIABLE, Records, default_path

    path = file or default_path()
    if path is None:
        raise RequestError(f"${VARIABLE} says that runs are not recorded", hint="name a file with --file")
    return Records(path)
