"""`moa-ray plugins`: what installed packages bring."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa_ray.cli.options import AsJson
from moa_ray.graph.plugins import GROUPS, installed


def plugins(as_json: AsJson = False) -> None:
    """List the plug-ins of installed packages, and why one cannot be loaded."""
    found = installed()
    if as_json:
        typer.echo(json.dumps([asdict(plugin) for plugin in found]))
        return
    if not found:
        typer.echo(f"No installed package brings one, by an entry point of {', '.join(GROUPS)}.")
        return
    table = Table("group", "name", "package", "version", "state", box=None, header_style="bold")
    for each in found:
        state = Text(each.error, "red") if each.error else Text("loaded")
        table.add_row(each.group, each.name, each.package, each.version, state)
    Console().print(table)
