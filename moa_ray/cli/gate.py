"""`moa-ray gate ...`: training of learned gates; no logic."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="gate", help="Train the gate of a graph.", no_args_is_help=True)


@app.command()
def train(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The graph's YAML file.", show_default=False)],
    outcomes: Annotated[Path, typer.Argument(help="Recorded outcomes (JSON lines).", show_default=False)],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File instead of the gate's `file`.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Most tokens that it may choose, as a share of the panel's.", min=0, max=1, show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same gate.", min=0, max=2**63 - 1)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Learn from recorded outcomes who answers a question best; a gate that runs takes the new file up."""
    from moa_ray.gates.learned.train import train
    from moa_ray.graph import load

    trained = asyncio.run(train(load(spec), outcomes, budget=budget, seed=seed))
    target = output or trained.path
    trained.gate.write(target)
    if as_json:
        figures = {
            "file": str(target),
            "questions": trained.questions,
            "has_best": trained.has_best,
            "cost": trained.cost,
            "cost_weight": trained.cost_weight,
            "load": trained.load,
        }
        typer.echo(json.dumps(figures))
        return
    typer.echo(f"{target}: trained on {trained.questions} questions")
    typer.echo(f"the best answer that is known is among those chosen for {trained.has_best:.1%} of them")
    typer.echo(f"they take {trained.cost:.0%} of the panel's tokens (cost_weight {trained.cost_weight:.2f})")
    typer.echo("load  " + "  ".join(f"{agent} {share:.0%}" for agent, share in trained.load.items()))
