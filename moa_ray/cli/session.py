"""`moa-ray run` and `moa-ray chat`: a graph up for one question or a conversation."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.prompt import Prompt
from rich.status import Status

from moa_ray.cli import gantt, models
from moa_ray.cli.view import DRAFTS_EVERY_S, View
from moa_ray.cluster import MoA
from moa_ray.engines.catalogue import CATALOGUE
from moa_ray.errors import MoARayError, ModelNotFound, RequestError
from moa_ray.graph import Graph, Message, conversation
from moa_ray.runtime import Event, RunFinished, RunOptions, Timeline, to_json
from moa_ray.runtime.records import Recorder, default_path


def run(
    graph: Graph, prompt: str, *, address: str | None, as_json: bool, timeline: bool = False, svg: Path | None = None
) -> None:
    """Answer one question on stdout; progress, drafts, the table and the timeline go to stderr.

    Args:
        graph: Whom to ask.
        prompt: What.
        address: The cluster.
        as_json: Events in place of all else.
        timeline: Show in the end what each call did when.
        svg: Write that to this file as a picture.
    """
    messages = conversation(prompt)  # a bad prompt is told before anything starts
    if svg is not None:
        write(svg, "")  # and so is a file that cannot be written
    lines = Timeline()
    with up(graph, address) as moa:
        if as_json:
            for event in _events(moa, messages):
                lines.add(event)
                print(json.dumps(to_json(event), ensure_ascii=False), flush=True)
        else:
            _show(moa, messages, lines)
    if timeline:
        console = Console(stderr=True, highlight=False)
        console.print(gantt.terminal(lines, console.width))
    if svg is not None:
        write(svg, gantt.svg(lines, graph.spec.name))


def write(path: Path, text: str) -> None:
    """Write a file that the user named.

    Raises:
        RequestError: If it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None


def chat(graph: Graph, *, address: str | None) -> None:
    """A conversation: every turn sees the ones before."""
    with up(graph, address) as moa:
        typer.echo(f"Talking with {graph.spec.name}. Ctrl-C stops an answer, Ctrl-D leaves.")
        history: list[Message] = []
        while (question := _question()) is not None:
            if not question.strip():
                continue
            asked: Message = {"role": "user", "content": question}
            try:
                answer = _show(moa, [*history, asked])
            except KeyboardInterrupt:
                typer.echo("\nstopped")
            except MoARayError as error:
                typer.echo(f"error: {error}", err=True)
            else:
                history += [asked, {"role": "assistant", "content": answer}]


def _question() -> str | None:
    try:
        return Prompt.ask("[bold]you[/]") if sys.stdin.isatty() else input()
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None


def _show(moa: MoA, messages: list[Message], timeline: Timeline | None = None) -> str:
    text = ""
    with View(moa.graph.depth) as view:
        for event in _events(moa, messages):
            view.add(event)
            if timeline is not None:
                timeline.add(event)
            if isinstance(event, RunFinished):
                text = event.text
    return text


def _events(moa: MoA, messages: list[Message]) -> Generator[Event, None, None]:
    """What happens as `moa` answers, recorded where runs are."""
    path = default_path()
    recorder = Recorder(path) if path else None
    record = recorder.run(messages) if recorder else None
    try:
        for event in moa.events(messages, RunOptions(draft_flush_s=DRAFTS_EVERY_S)):
            if record:
                record.add(event)
            yield event
    finally:
        if recorder and record:
            record.close()
            recorder.close()


def fetch_models(graph: Graph) -> None:
    """Have the models of `graph` on this machine, downloading what is missing."""
    for name, spec in graph.engines.items():
        if spec.kind == "llamacpp" or (spec.kind == "vllm" and spec.model in CATALOGUE):
            try:
                models.fetch(spec.model)
            except ModelNotFound as error:
                place = graph.source.error((*graph.path_of_engine(name), "model"), error.message)
                raise ModelNotFound(place.message, hint=error.hint) from None


class Waiting:
    """A line on stderr that says what is being waited for; called as a deployment goes on."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self.stop = status.stop

    def __call__(self, ready: dict[str, tuple[int, int]]) -> None:
        """Say which engines are not ready yet."""
        waiting = [name for name, (up, wanted) in ready.items() if up < wanted]
        if waiting:
            up = len(ready) - len(waiting)
            self._status.update(f"{up} of {len(ready)} engines ready; loading {', '.join(waiting)}…")


@contextmanager
def progress() -> Generator[Waiting, None, None]:
    """The line, for as long as the context is open or until it is stopped."""
    with Console(stderr=True).status("Starting Ray…") as status:
        yield Waiting(status)


@contextmanager
def up(graph: Graph, address: str | None) -> Generator[MoA, None, None]:
    """The graph on a cluster, its models fetched where that is this machine."""
    if address is None:
        fetch_models(graph)
    with progress() as show:
        moa = MoA(graph, address=address, progress=show)
    try:
        yield moa
    finally:
        moa.close()
