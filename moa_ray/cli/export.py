"""`moa-ray export`: a graph as a file of another workflow engine; no logic."""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from moa_ray.cli import output


class Engine(StrEnum):
    """What a file is written for."""

    airflow = "airflow"
    langgraph = "langgraph"
    mermaid = "mermaid"
    prefect = "prefect"


def export(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The graph's YAML file.", show_default=False)],
    to: Annotated[Engine, typer.Option("--to", help="The engine.", show_default=False)],
    server: Annotated[
        str, typer.Option(help="The server that makes the calls; its key is in $MOA_RAY_API_KEY.")
    ] = "http://127.0.0.1:8000/v1",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file.", show_default=False)] = None,
) -> None:
    """Write a SPEC as a file of another workflow engine, one task a call, that runs as it stands.

    What that engine cannot express is told on stderr, and at the head of the file.
    """
    from moa_ray.graph import draw, load
    from moa_ray.integrations import step_by_step

    graph = load(spec)
    if to is Engine.mermaid:
        text = draw.mermaid(graph)
    else:
        text = import_module(f"moa_ray.integrations.{to.value}").source(graph, server)
        for lost in step_by_step(graph)[1]:
            typer.echo(f"not in {to.value}: {lost}", err=True)
    if out is None:
        typer.echo(text)
    else:
        output.write("--out", out, text)
