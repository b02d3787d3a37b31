"""`moa-ray bench`: load against an OpenAI-compatible endpoint; no logic."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moa_ray.cli.options import AsJson
from moa_ray.cli.output import check, write
from moa_ray.errors import MoARayError

if TYPE_CHECKING:
    from moa_ray.evaluate import Figures, Sample
    from moa_ray.evaluate.bench import Load

_LATE_MS = 50.0


def bench(
    url: Annotated[str, typer.Argument(metavar="URL", help="Base URL of an OpenAI-compatible endpoint.")],
    model: Annotated[str | None, typer.Option(help="The first that it lists where not given.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Requests.", min=1)] = 100,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: callers at once; 8 where nothing is given.", min=1)
    ] = None,
    request_rate: Annotated[float | None, typer.Option(help="Open loop: requests a second.", min=1e-3, max=1e6)] = None,
    burstiness: Annotated[
        float,
        typer.Option(help="Of an open loop: 1 is Poisson, less comes in bursts, more is regular.", min=1e-2, max=1e6),
    ] = 1.0,
    warmups: Annotated[int, typer.Option(help="Requests before, which are not counted.", min=0)] = 1,
    dataset: Annotated[
        Path | None, typer.Option(help='JSON lines with "prompt", "messages" or "turns".', show_default=False)
    ] = None,
    input_len: Annotated[int, typer.Option(help="Words of a prompt where there is no data set.", min=1)] = 128,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 128,
    timeout: Annotated[float, typer.Option(help="Longest time of a request, in seconds.", min=0.1, max=86_400)] = 120.0,
    goodput: Annotated[
        list[str] | None, typer.Option(help="ttft:MS, tpot:MS or e2el:MS that a good request keeps.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and times.", min=0)] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the figures here, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put load on URL, and print TTFT, TPOT, ITL, total and goodput as `vllm bench serve` counts them."""
    from moa_ray.evaluate import Figures, Objectives
    from moa_ray.evaluate.bench import Load, find_model

    load = Load(
        url=url,
        model=model,
        count=num_prompts,
        callers=max_concurrency,
        rate=request_rate,
        burstiness=burstiness,
        warmups=warmups,
        file=dataset,
        words=input_len,
        max_tokens=max_tokens,
        timeout_s=timeout,
        seed=seed,
    )
    check("--output", output)
    objectives = Objectives.of(goodput) if goodput else None
    prompts = load.prompts()
    found = find_model(load)
    samples: list[Sample] = []
    stopped = False
    try:
        duration_s = asyncio.run(_run(load, found, prompts, samples))
    except KeyboardInterrupt:  # what was measured is worth telling
        stopped, duration_s = True, max((each.started_s + each.e2el_s for each in samples), default=0.0)
    figures = Figures(samples, duration_s, objectives)
    told = load.about(found) | figures.to_json()
    if samples:
        _tell(figures, told, as_json=as_json, output=output)
    if stopped:
        raise typer.Exit(130)
    if not told["completed"]:
        raise MoARayError(f"no request succeeded; the first said: {samples[0].message}")


async def _run(load: Load, model: str, prompts: list[Any], samples: list[Sample]) -> float:
    from moa_ray.evaluate.bench import measure

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("warming up", total=load.count)

        def book(sample: Sample) -> None:
            samples.append(sample)
            bar.update(task, description="asking", advance=1)

        return await measure(load, model, prompts, book)


def _tell(figures: Figures, told: dict[str, Any], *, as_json: bool, output: Path | None) -> None:
    if as_json:
        typer.echo(json.dumps(told))
    else:
        _show(figures, told)
    if output:  # last: figures that cannot be written are still shown
        write("--output", output, json.dumps(told, indent=2) + "\n")


def _show(figures: Figures, told: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(_table(told))
    for kind, count in figures.errors.most_common():
        first = next(sample.message for sample in figures.samples if sample.error == kind)
        console.print(f"{count} x {kind}: {first}", markup=False)
    if figures.sent_late_ms > _LATE_MS:
        console.print(
            f"requests were sent up to {figures.sent_late_ms:.0f} ms late: this machine is too slow for the load"
        )


def _table(told: dict[str, Any]) -> Table:
    goodput = "" if told["request_goodput"] is None else f", {told['request_goodput']:.2f}/s of them good"
    title = (
        f"{told['model']}: {told['completed']} answers in {told['duration']:.1f} s, {told['failed']} failed; "
        f"{told['request_throughput']:.2f}/s{goodput}, {told['output_throughput']:.1f} tokens/s"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("ms", no_wrap=True)
    kinds = ("mean", "p50", "p95", "p99")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "total")):
        times = (told[f"{kind}_{name}_ms"] for kind in kinds)
        table.add_row(label, *("–" if time is None else f"{time:.1f}" for time in times))
    return table
