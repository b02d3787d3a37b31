"""`moa-ray moe ...`: commands of the local Mixture-of-Experts room; no logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="moe", help="Train and use the Mixture-of-Experts language model.", no_args_is_help=True)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Training file (YAML).")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    output: Annotated[Path | None, typer.Option(help="Directory instead of the file's `output`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, without a progress bar.")] = False,
) -> None:
    """Train a language model; writes checkpoints, a CSV log and a plot of the loss."""
    from moa_ray.moe.train import train

    try:
        result = train(config, resume=resume, output=output, show=not as_json)
    except KeyboardInterrupt:
        typer.echo("interrupted; --resume goes on from the last checkpoint, where there is one", err=True)
        raise
    balance = result.stats.summary() if result.stats else {}
    if as_json:
        figures = {
            "steps": result.steps,
            "perplexity": result.perplexity,
            "checkpoint": str(result.checkpoint),
        }
        typer.echo(json.dumps(figures | balance))
        return
    typer.echo(f"perplexity {result.perplexity:.3f} after {result.steps} steps, checkpoint {result.checkpoint}")
    typer.echo("  ".join(f"{name} {value:.3g}" for name, value in balance.items()))


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run's directory.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(help="Words or bytes to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest.")] = 0.8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.", min=0, max=2**63 - 1)] = 0,
) -> None:
    """Continue a prompt with a trained model."""
    from moa_ray.moe.generate import generate

    text = generate(checkpoint, prompt, tokens=tokens, temperature=temperature, seed=seed)
    typer.echo(prompt + text)


@app.command()
def bench(
    as_json: Annotated[bool, typer.Option("--json", help="Print seconds as JSON.")] = False,
) -> None:
    """Time grouped experts against one dense network, and training steps with more and more experts."""
    from moa_ray.moe.bench import grouped_against_dense, training_step

    seconds = {"forward": grouped_against_dense(), "training step by experts": training_step()}
    if as_json:
        typer.echo(json.dumps(seconds))
        return
    for title, sides in seconds.items():
        first = next(iter(sides.values()))
        typer.echo(title)
        for name, value in sides.items():
            typer.echo(f"  {name:8} {value * 1e3:9.1f} ms  {value / first:5.2f}x")
