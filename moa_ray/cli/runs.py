"""`moa-ray runs`: what was recorded of runs, by `run`, `chat` and servers on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa_ray.cli import gantt
from moa_ray.cli.options import AsJson
from moa_ray.cli.view import View
from moa_ray.errors import RequestError
from moa_ray.graph import ANSWER, RANK
from moa_ray.runtime import AgentEvent, Event, Timeline
from moa_ray.runtime.records import VARIABLE, Records, RunRow, default_path

app = typer.Typer(help="Look at runs that were recorded.", no_args_is_help=True)

File = Annotated[Path | None, typer.Option("--file", help=f"The records; ${VARIABLE} or this user's where not given.")]
Run = Annotated[str, typer.Argument(help="The run's id, or how it begins, or `last`.")]

_STYLES = {"finished": "green", "failed": "red", "left": "yellow"}


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
    else:
        Console(highlight=False).print(_table(rows))


@app.command()
def show(
    run: Run,
    timeline: Annotated[bool, typer.Option("--timeline", help="And what each call did when.")] = False,
    file: File = None,
) -> None:
    """Show a RUN: the question, the answer, and what each agent took."""
    row, events = _records(file).find(run)
    _show(row, events, events)
    if timeline:
        console = Console(highlight=False)
        console.print(gantt.terminal(Timeline(events), console.width))


@app.command()
def replay(
    run: Run,
    speed: Annotated[float, typer.Option(help="Times as fast as it was.", min=0.01)] = 1.0,
    file: File = None,
) -> None:
    """Show a RUN as it went, in its own time."""
    row, events = _records(file).find(run)
    _show(row, events, _in_time(events, speed))


@app.command()
def export(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN...]", help="All where not given.")] = None,
    file: File = None,
) -> None:
    """Print the events of runs, one JSON object a line, as `moa-ray run --json` does."""
    for line in _records(file).lines(runs or []):
        typer.echo(line)


def _records(file: Path | None) -> Records:
    path = file or default_path()
    if path is None:
        raise RequestError(f"${VARIABLE} says that runs are not recorded", hint="name a file with --file")
    return Records(path)


def _in_time(events: Sequence[Event], speed: float) -> Iterable[Event]:
    began = time.monotonic()
    for event in events:
        time.sleep(max(0.0, event.t / speed - (time.monotonic() - began)))
        yield event


def _show(row: RunRow, events: Sequence[Event], told: Iterable[Event]) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(Text(f"{row.run}  {row.graph}  {_when(row)}  {row.state}", style="dim"))
    console.print(Text(row.asked[-1]["content"], style="bold"))
    with View(_depth(events)) as view:
        for event in told:
            view.add(event)
    if row.error:
        console.print(Text(row.error, style="red"))


def _depth(events: Iterable[Event]) -> int:
    """Layers of the graph, without its aggregator's."""
    return max((e.layer for e in events if isinstance(e, AgentEvent) and e.call not in (ANSWER, RANK)), default=0)


def _table(rows: Sequence[RunRow]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", "graph", "when", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("TTFT s", "total s", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("question", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        table.add_row(
            row.run,
            row.graph,
            _when(row),
            Text(row.state, style=_STYLES[row.state]),
            "" if row.ttft_s is None else f"{row.ttft_s:.2f}",
            f"{row.seconds:.2f}",
            str(row.prompt_tokens + row.completion_tokens),
            " ".join(row.asked[-1]["content"].split()),
        )
    return table


def _when(row: RunRow) -> str:
    return datetime.fromtimestamp(row.began).strftime("%Y-%m-%d %H:%M:%S")
