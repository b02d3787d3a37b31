"""`moa-ray batch`: a file of requests into a file of answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moa_ray.cli.session import up
from moa_ray.errors import MoARayError, RequestError
from moa_ray.graph import Graph
from moa_ray.runtime.batch import Tally, batch


class Bar:
    """A progress bar on stderr, and above it a line for each input that has no answer."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("starting")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def began(self, tally: Tally) -> None:
        """Show what is there already."""
        self._show(tally)

    def ended(self, tally: Tally, line: int, error: MoARayError | None) -> None:
        """Show one more."""
        if error is not None:
            what = "is no request" if isinstance(error, RequestError) else "failed"
            self._progress.console.print(f"line {line} {what}: {error.message}", markup=False, highlight=False)
        self._show(tally)

    def _show(self, tally: Tally) -> None:
        done = tally.answered + tally.bad + tally.failed
        self._progress.update(self._task, description="answering", completed=done, total=tally.total)


def run(graph: Graph, source: Path, target: Path, *, concurrency: int, address: str | None) -> None:
    """Answer the file; the summary goes to stderr.

    Raises:
        MoARayError: At the end, if requests failed.
    """
    with up(graph, address) as moa, Bar() as bar:
        tally = asyncio.run(batch(moa.answer, source, target, concurrency=concurrency, watch=bar))
    summary = f"{tally.answered} of {tally.total} answered, {tally.bad} bad, {tally.failed} failed"
    Console(stderr=True, highlight=False).print(summary)
    if tally.failed:
        raise MoARayError(f"{tally.failed} requests failed", hint="the same command asks them again")
