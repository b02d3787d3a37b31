"""How a run looks: agents live on a terminal, then the answer, then what it took.

The answer goes to stdout; all else goes to stderr, so that a pipe gets the answer and nothing else.
"""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from moa_ray.engines import Usage
from moa_ray.runtime import (
    AgentDelta,
    AgentFailed,
    AgentFinished,
    AgentStarted,
    AnswerDelta,
    CallRecord,
    Event,
    GateDecided,
    Ledger,
    Notice,
    RunFinished,
)

DRAFTS_EVERY_S = 0.1
"""How often a draft's newer text is wanted."""
_TAIL_LINES = 2
_ICONS = {"finished": ("✓", "green"), "failed": ("✗", "red"), "cancelled": ("–", "yellow"), "running": ("·", "dim")}


class View:
    """A consumer of one run's events; a context manager, since it may hold the terminal.

    Args:
        depth: Layers of the graph, without its aggregator's.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._err = Console(stderr=True, highlight=False)
        self._ledger = Ledger()
        self._drafts: dict[str, str] = {}
        self._notes: dict[str, str] = {}
        self._spinner = Spinner("dots")
        self._live = Live(console=self._err, refresh_per_second=10, get_renderable=self._panes)
        self._answering = False

    def __enter__(self) -> View:
        if self._err.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def add(self, event: Event) -> None:
        """Show one event."""
        self._ledger.add(event)
        match event:
            case Notice():
                self._err.print(Text(event.text, style="yellow"))
            case GateDecided():
                self._err.print(_gate(event))
            case AgentStarted():
                if not (event.continued or event.hedge):
                    self._drafts[event.call] = ""
                self._notes[event.call] = "; ".join(event.trimmed)
            case AgentDelta():
                self._drafts[event.call] += event.text
            case AgentFinished():
                self._drafts[event.call] = event.text
            case AgentFailed(will_retry=True):
                self._notes[event.call] = f"trying again: {event.message}"
            case AnswerDelta():
                self._begin_answer()
                sys.stdout.write(event.text)
                sys.stdout.flush()
            case RunFinished():
                self._finish(event)
            case _:
                pass

    # ------------------------------------------------------------------ while the agents work

    def _panes(self) -> Group:
        panes: list[Table | Text] = []
        layer = -1
        for record in self._ledger.records:
            if record.layer != layer:
                layer = record.layer
                panes.append(Text(self._layer_name(layer), style="bold"))
            panes.append(self._pane(record))
        return Group(*panes)

    def _layer_name(self, layer: int) -> str:
        return "gate" if not layer else "aggregator" if layer > self._depth else f"layer {layer}"

    def _pane(self, record: CallRecord) -> Table:
        icon, style = _ICONS[record.state]
        pane = Table.grid(padding=(0, 1))
        pane.add_column(width=1)
        pane.add_column(width=14, no_wrap=True)
        pane.add_column(ratio=1)
        pane.expand = True
        mark = self._spinner if record.state == "running" and not self._answering else Text(icon, style=style)
        body = Text(self._tail(record), style="dim" if record.state == "running" else "")
        note = record.error or self._notes.get(record.call, "")
        if note:
            body = Text.assemble(body, "\n" if body.plain else "", (note, "yellow"))
        pane.add_row(mark, Text(record.call.partition("/")[2] or record.agent, style="bold cyan"), body)
        return pane

    def _tail(self, record: CallRecord) -> str:
        width = max(20, self._err.width - 20)
        if record.layer > self._depth:
            return ""
        words = " ".join(self._drafts.get(record.call, "").split())
        if len(words) <= _TAIL_LINES * width:
            return words
        return "… " + words[-_TAIL_LINES * width + 2 :].partition(" ")[2]

    # ------------------------------------------------------------------ the answer and after

    def _begin_answer(self) -> None:
        if self._answering:
            return
        self._answering = True
        self._live.stop()
        if self._err.is_terminal:
            self._err.print(Rule("answer", style="dim"))

    def _finish(self, event: RunFinished) -> None:
        self._live.stop()
        if self._answering:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if event.note:
            self._err.print(Text(event.note, style="dim"))
        self._err.print(self._table(event))

    def _table(self, event: RunFinished) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("agent")
        table.add_column("engine")
        for name in ("state", "prompt", "cached", "tokens", "TTFT s", "total s"):
            table.add_column(name, justify="left" if name == "state" else "right")
        priced = event.dollars is not None
        if priced:
            table.add_column("$", justify="right")
        for record in self._ledger.records:
            icon, style = _ICONS[record.state]
            state = Text(f"{icon} {record.state}{_how_often(record)}", style)
            took = seconds(record.ttft_s), seconds(record.seconds), _dollars(record.dollars)
            table.add_row(record.call, record.engine, state, *_tokens(record.usage), *took[: 2 + priced])
        table.add_section()
        took = seconds(event.ttft_s), seconds(event.t), _dollars(event.dollars)
        table.add_row("all", "", "", *_tokens(event.usage), *took[: 2 + priced], style="bold")
        return table


def _gate(event: GateDecided) -> Text:
    """Who answers, and why."""
    if event.failed:
        return Text(f"gate {event.kind}: everybody answers, since {event.failed}", style="yellow")
    shares = ", ".join(f"{agent} {share:.2f}" for agent, share in event.shares.items())
    who = shares or (f"{event.calls} call" if event.calls else "answered already")
    note = f" ({event.note})" if event.note else ""
    return Text(f"gate {event.kind}: {who}{note}, {event.seconds * 1e3:.0f} ms", style="dim")


def _tokens(usage: Usage) -> tuple[str, str, str]:
    return str(usage.prompt_tokens), str(usage.cached_tokens), str(usage.completion_tokens)


def seconds(value: float | None) -> str:
    """Seconds as all tables show them; "" for none."""
    return "" if value is None else f"{value:.2f}"


def _dollars(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _how_often(record: CallRecord) -> str:
    parts = [f"{record.stages} stages"] if record.stages > 1 else []
    tries = 1 + record.retries + record.hedges
    return f" ({', '.join([*parts, *([f'{tries} tries'] if tries > 1 else [])])})" if parts or tries > 1 else ""
