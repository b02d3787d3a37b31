"""`moa-ray models`: what the catalogue holds, and fetching it."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from moa_ray.engines import catalogue

app = typer.Typer(help="Models that run here.", no_args_is_help=True)


@app.command("list")
def list_models(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the models of the catalogue."""
    models = [(model, catalogue.is_present(model.name)) for model in catalogue.CATALOGUE.values()]
    if as_json:
        rows = [
            {"name": m.name, "present": here, "bytes": m.size, "licence": m.licence, "description": m.description}
            for m, here in models
        ]
        typer.echo(json.dumps(rows))
        return
    table = Table("model", "here", "size", "licence", "what it is", box=None, header_style="bold")
    for model, here in models:
        size = f"{model.size / 1e6:.0f} MB"
        table.add_row(model.name, "yes" if here else "no", size, model.licence, model.description)
    Console().print(table)
    typer.echo("A path to a GGUF file and a Hugging Face id (org/repo[:file.gguf]) are models, too.")


@app.command()
def pull(name: Annotated[str, typer.Argument(help="Catalogue name, Hugging Face id, or path.")]) -> None:
    """Fetch a model, unless it is here already."""
    typer.echo(str(fetch(name)))


def fetch(name: str) -> str:
    """The model's file, downloaded where it is missing, with a progress bar on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task: TaskID | None = None

    def show(done: int, total: int | None, label: str) -> None:  # never called for a model that is here
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(label)
            if not console.is_terminal:
                console.print(f"fetching {label}")
        bar.update(task, completed=done, total=total, description=label)

    try:
        return str(catalogue.resolve(name, progress=show))
    finally:
        bar.stop()
