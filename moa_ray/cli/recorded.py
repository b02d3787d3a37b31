"""How recorded runs look in the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa_ray.cli import gantt
from moa_ray.cli.view import View, seconds
from moa_ray.graph import ANSWER, RANK
from moa_ray.runtime import AgentEvent, Event, Timeline
from moa_ray.runtime.records import RunRow

_STYLES = {"finished": "green", "failed": "red", "left": "yellow"}


def in_time(events: Sequence[Event], speed: float) -> Iterable[Event]:
    """The events in their own time, or `speed` times as fast."""
    began = time.monotonic()
    for event in events:
        time.sleep(max(0.0, event.t / speed - (time.monotonic() - began)))
        yield event


def show(row: RunRow, events: Sequence[Event], told: Iterable[Event], *, timeline: bool = False) -> None:
    """Show a run as it looked to its caller, who sees its events as `told` brings them."""
    console = Console(stderr=True, highlight=False)
    console.print(Text(f"{row.run}  {row.graph}  {_when(row)}  {row.state}", style="dim"))
    console.print(Text(row.asked[-1]["content"], style="bold"))
    with View(_depth(events)) as view:
        for event in told:
            view.add(event)
    if row.error:
        console.print(Text(row.error, style="red"))
    if timeline:
        out = Console(highlight=False)
        out.print(gantt.terminal(Timeline(events), out.width))


def _depth(events: Iterable[Event]) -> int:
    """Layers of the graph, without its aggregator's."""
    return max((e.layer for e in events if isinstance(e, AgentEvent) and e.call not in (ANSWER, RANK)), default=0)


def table(rows: Sequence[RunRow]) -> Table:
    """One run a line."""
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", "graph", "when", "state"):
        shown.add_column(name, no_wrap=True)
    for name in ("TTFT s", "total s", "tokens"):
        shown.add_column(name, justify="right")
    shown.add_column("question", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        shown.add_row(
            row.run,
            row.graph,
            _when(row),
            Text(row.state, style=_STYLES[row.state]),
            seconds(row.ttft_s),
            seconds(row.seconds),
            str(row.prompt_tokens + row.completion_tokens),
            " ".join(row.asked[-1]["content"].split()),
        )
    return shown


def _when(row: RunRow) -> str:
    return datetime.fromtimestamp(row.began).strftime("%Y-%m-%d %H:%M:%S")
