"""`moa-ray eval` and `tune`: whether a panel is worth it, and which one; no logic."""

from __future__ import annotations

import asyncio
import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moa_ray.cli.options import Address, AsJson
from moa_ray.cli.output import check, write

CACHE = Path("~/.cache/moa-ray/eval")

Data = Annotated[
    str, typer.Option("--data", help="Questions: JSON lines, or hf:NAME:CONFIG:SPLIT.", show_default=False)
]
Scorer = Annotated[
    str | None,
    typer.Option(help="number, choice, exact, contains, or a plug-in's.", show_default=False),
]
Limit = Annotated[int | None, typer.Option(help="Use so many questions, the first.", min=1, show_default=False)]
Concurrency = Annotated[int, typer.Option(help="Questions that are asked at once.", min=1)]
CacheFolder = Annotated[Path, typer.Option("--cache", help="Folder of answers that were had before.")]
Seed = Annotated[int, typer.Option(help="Of sampling.", min=0, max=2**30)]


def evaluate(
    specs: Annotated[list[Path], typer.Argument(metavar="SPEC...", help="The first is compared with the others.")],
    data: Data,
    scorer: Scorer = None,
    limit: Limit = None,
    alone: Annotated[bool, typer.Option(help="Ask each agent of the first graph alone, too.")] = True,
    equal_budget: Annotated[bool, typer.Option(help="Give its best agent the same tokens (self-consistency).")] = True,
    endpoint: Annotated[
        list[str] | None, typer.Option(help="URL#MODEL, to compare with; $OPENAI_API_KEY is sent.", show_default=False)
    ] = None,
    judge: Annotated[
        list[str] | None, typer.Option(help="A graph's file or URL#MODEL that compares answers.", show_default=False)
    ] = None,
    concurrency: Concurrency = 4,
    cache: CacheFolder = CACHE,
    seed: Seed = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write every answer here, as JSON lines.", show_default=False)
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Say whether the graph in SPEC is worth it: beside its agents alone, at equal tokens, and beside others."""
    from moa_ray.evaluate import report, results, tasks, trials
    from moa_ray.evaluate.arms import arms_of
    from moa_ray.evaluate.arms import endpoint as endpoint_arm
    from moa_ray.evaluate.served import serving
    from moa_ray.evaluate.study import Study, carry_out
    from moa_ray.graph import load

    check("--output", output)
    check("--html", html)
    key = os.environ.get("OPENAI_API_KEY")
    judges = [
        endpoint_arm(each, api_key=key) if "#" in each else arms_of(load(each), seed=seed)[0] for each in judge or ()
    ]
    study = Study(
        tasks.load(data, scorer=scorer, limit=limit),
        [load(spec) for spec in specs],
        alone=alone,
        equal_budget=equal_budget,
        endpoints=[endpoint_arm(each, api_key=key) for each in endpoint or ()],
        judges=judges,
        seed=seed,
    )
    graphs = [arm.graph for arm in (*study.arms(), *judges)]
    with serving(graphs, cache.expanduser(), address) as served, Bars() as bars:
        found = asyncio.run(carry_out(study, served, concurrency=concurrency, progress=bars.tell))
    if as_json:
        typer.echo(json.dumps(results.to_json(found)))
    else:
        Console(highlight=False).print(report.rendered(found))
    if output:
        lines = (json.dumps(trials.to_json(trial)) for each in found.trials.values() for trial in each)
        write("--output", output, "".join(f"{line}\n" for line in lines))
    if html:
        write("--html", html, report.html(found))


def tune(
    pool: Annotated[Path, typer.Argument(metavar="POOL", help="A graph's file; its agents are the pool.")],
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="Write the chosen graph here.", show_default=False)],
    scorer: Scorer = None,
    limit: Limit = None,
    most_tokens: Annotated[
        float | None, typer.Option(help="Of an answer on average, prompts included.", min=1, show_default=False)
    ] = None,
    most_seconds: Annotated[
        float | None, typer.Option(help="Median time of an answer.", min=0, show_default=False)
    ] = None,
    proposers: Annotated[int, typer.Option(help="Most proposers.", min=1, max=64)] = 6,
    repeats: Annotated[bool, typer.Option("--repeats", help="A model may propose several times (Self-MoA).")] = False,
    concurrency: Concurrency = 4,
    cache: CacheFolder = CACHE,
    seed: Seed = 0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Choose proposers and an aggregator from the agents in POOL, and write the graph."""
    from moa_ray.evaluate import report, tasks
    from moa_ray.evaluate.pool import Pool
    from moa_ray.evaluate.served import serving
    from moa_ray.evaluate.tune import Budget, choose

    check("--output", output)
    of = Pool(pool, tasks.load(data, scorer=scorer, limit=limit), seed=seed)
    budget = Budget(most_tokens, most_seconds)
    with serving([of.graph], cache.expanduser(), address) as served, Bars() as bars:
        measure = partial(of.measure, served=served, concurrency=concurrency, progress=bars.tell)
        tuned = asyncio.run(choose(of.models, measure, budget=budget, most=proposers, repeats=repeats))
    write("--output", output, of.written(tuned.panel))
    if as_json:
        typer.echo(json.dumps(tuned.to_json() | {"agreement": dict(of.agreement)}))
    else:
        Console(highlight=False).print(report.tuned(tuned, of.agreement))
        typer.echo(f"written to {output}")


class Bars:
    """A progress bar for each arm, on stderr."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, name: str, done: int, of: int) -> None:
        """How far an arm is."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=of)
        self._progress.update(self._tasks[name], completed=done)
