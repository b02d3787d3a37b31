"""Records of runs: all events of a run in an SQLite file, to be listed, shown, replayed and exported later.

A run only gathers its events; a thread of the recorder writes them down when the run is over. So a slow, full or
locked disk costs no request anything: what cannot be written is counted, and lost.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_random

from moa_ray.errors import RequestError
from moa_ray.graph import Message
from moa_ray.runtime.events import Event, RunFinished, RunStarted, from_json, to_json

State = Literal["finished", "failed", "left"]

VARIABLE = "MOA_RAY_RECORDS"
_OFF = "off"
_WAITING_RUNS = 1000
_LOCKED_S = 1.0
_PRUNE_EVERY = 100
_TEXTS = frozenset({"text", "content", "arguments"})
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
  run TEXT PRIMARY KEY, graph TEXT NOT NULL, began REAL NOT NULL, seconds REAL NOT NULL, ttft_s REAL,
  state TEXT NOT NULL, error TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
  asked TEXT NOT NULL, events TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_time ON runs (began);
"""
_COLUMNS = "run, graph, began, seconds, ttft_s, state, error, prompt_tokens, completion_tokens, asked"

log = logging.getLogger(__name__)


def default_path() -> Path | None:
    """`$MOA_RAY_RECORDS`, or a file in the user's state folder; None where the variable says `off`."""
    named = os.environ.get(VARIABLE, "")
    if named == _OFF:
        return None
    folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    return (Path(named) if named else folder / "moa-ray" / "runs.sqlite").expanduser().absolute()


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept of runs, and for how long.

    Args:
        days: Older runs are removed.
        runs: Of more than so many, the oldest are removed.
        texts: Whether questions, drafts and answers are kept; else their lengths in their place.
    """

    days: float = 30.0
    runs: int = 10_000
    texts: bool = True


@dataclass(frozen=True, slots=True)
class RunRow:
    """What is known of one run.

    Args:
        run: Its id.
        graph: Name of the graph.
        began: When, in seconds since 1970.
        seconds: How long it took.
        ttft_s: Seconds to the answer's first token; None where there was none.
        state: How it ended; `left` where its caller did not wait.
        error: Why it failed, "" where it did not.
        prompt_tokens: Of all calls.
        completion_tokens: Of all calls.
        asked: The conversation.
    """

    run: str
    graph: str
    began: float
    seconds: float
    ttft_s: float | None
    state: State
    error: str
    prompt_tokens: int
    completion_tokens: int
    asked: tuple[Message, ...]


class Recorder:
    """Writes runs down, in a thread of its own.

    Args:
        path: The file; it and its folder are made where they are missing, for this user's eyes alone.
        retention: What is kept, and for how long.

    Attributes:
        lost: Runs that could not be written.
    """

    def __init__(self, path: Path, retention: Retention | None = None) -> None:
        self._path, self._retention = path, retention or Retention()
        self._waiting: queue.Queue[_Run | None] = queue.Queue(_WAITING_RUNS)
        self._file: sqlite3.Connection | None = None
        self._written = 0
        self.lost = 0
        self._thread = threading.Thread(target=self._write_all, name="moa-ray records", daemon=True)
        self._thread.start()

    def run(self, asked: Sequence[Message]) -> RunRecord:
        """A consumer of the events of one run, of a conversation."""
        return RunRecord(self, tuple(asked))

    def put(self, run: _Run) -> None:
        """Have a run written down; at once, and never an error."""
        try:
            self._waiting.put_nowait(run)
        except queue.Full:
            self.lost += 1

    def close(self, within_s: float = 5.0) -> None:
        """Write what waits, for so long at most."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=within_s)
            self._thread.join(within_s)

    def _write_all(self) -> None:
        while run := self._waiting.get():
            try:
                self._write(run)
            except (OSError, sqlite3.Error) as error:
                if not self.lost:
                    log.warning("runs are not recorded: %s: %s (%s=%s)", self._path, error, VARIABLE, _OFF)
                self.lost += 1
                self._forget_file()
        self._forget_file()

    def _write(self, run: _Run) -> None:
        file = self._file = self._file or _open_to_write(self._path)
        with file:
            file.execute(
                f"INSERT OR REPLACE INTO runs ({_COLUMNS}, events) VALUES (?{', ?' * 10})",
                run.row(texts=self._retention.texts),
            )
            if self._written % _PRUNE_EVERY == 0:
                self._prune(file)
        self._written += 1

    def _prune(self, file: sqlite3.Connection) -> None:
        file.execute("DELETE FROM runs WHERE began < ?", (time.time() - self._retention.days * 86_400,))
        file.execute(
            "DELETE FROM runs WHERE run IN (SELECT run FROM runs ORDER BY began DESC LIMIT -1 OFFSET ?)",
            (self._retention.runs,),
        )

    def _forget_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class RunRecord:
    """Gathers the events of one run.

    Args:
        recorder: Who writes them down.
        asked: The conversation.
    """

    def __init__(self, recorder: Recorder, asked: tuple[Message, ...]) -> None:
        self._recorder, self._asked = recorder, asked
        self._events: list[Event] = []
        self._began = time.time()

    def add(self, event: Event) -> None:
        """Keep one event; the last one has the run written down."""
        if isinstance(event, RunStarted):
            self.close()  # a router died, and another one runs the request anew
            self._began = time.time() - event.t
        self._events.append(event)
        if isinstance(event, RunFinished):
            self.close()

    def close(self) -> None:
        """Have written down what there is: of a run that its caller left, what it did until then."""
        if self._events:
            self._recorder.put(_Run(self._began, self._asked, tuple(self._events)))
            self._events = []


@dataclass(frozen=True, slots=True)
class _Run:
    began: float
    asked: tuple[Message, ...]
    events: tuple[Event, ...]

    def row(self, *, texts: bool) -> tuple[Any, ...]:
        first, last = self.events[0], self.events[-1]
        end = last if isinstance(last, RunFinished) else None
        state: State = "left" if end is None else "failed" if end.error else "finished"
        keep = _same if texts else _lengths
        return (
            first.run,
            first.graph if isinstance(first, RunStarted) else "",
            self.began,
            last.t,
            end.ttft_s if end else None,
            state,
            f"{end.error}: {end.message}" if end and end.error else "",
            end.usage.prompt_tokens if end else 0,
            end.usage.completion_tokens if end else 0,
            _json([keep(dict(message)) for message in self.asked]),
            "\n".join(_json(keep(to_json(event))) for event in self.events),
        )


def _same(value: Any) -> Any:
    return value


def _lengths(value: Any) -> Any:
    """`value` with every text in it as `[5 characters]`."""
    match value:
        case Mapping():
            return {key: _length(item) if key in _TEXTS else _lengths(item) for key, item in value.items()}
        case list() | tuple():
            return [_lengths(item) for item in value]
        case _:
            return value


def _length(value: Any) -> Any:
    return f"[{len(value)} characters]" if isinstance(value, str) else _lengths(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _open_to_write(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    file = sqlite3.connect(path, timeout=_LOCKED_S, check_same_thread=False)
    _prepare(file)
    return file


@retry(
    retry=retry_if_exception_type(sqlite3.OperationalError),
    stop=stop_after_delay(_LOCKED_S),
    wait=wait_random(0, 0.05),
    reraise=True,
)
def _prepare(file: sqlite3.Connection) -> None:
    file.execute("PRAGMA journal_mode=WAL")  # where two do this at once, one fails at once and does not wait
    file.execute("PRAGMA synchronous=NORMAL")
    file.executescript(_SCHEMA)


# ---------------------------------------------------------------- what was recorded


class Records:
    """Reads what a recorder wrote, also while it writes.

    Args:
        path: The file.

    Raises:
        RequestError: If there is none, or it holds no runs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise RequestError(f"{path}: no run was recorded", hint=f"${VARIABLE} may name another file, or say {_OFF}")

    def latest(self, count: int, graph: str = "") -> list[RunRow]:
        """The latest runs, of one graph or of all, the latest last."""
        where = "WHERE graph = ?" if graph else "WHERE ? = ''"
        rows = self._query(f"SELECT {_COLUMNS} FROM runs {where} ORDER BY began DESC LIMIT ?", (graph, count))
        return [_row(row) for row in reversed(rows)]

    def find(self, run: str) -> tuple[RunRow, tuple[Event, ...]]:
        """One run and its events, by its id or by how that begins; `last` is the latest.

        Raises:
            RequestError: If there is none, or several begin like this.
        """
        *row, events = self._find(run)
        return _row(row), tuple(from_json(json.loads(line)) for line in events.split("\n"))

    def lines(self, runs: Sequence[str]) -> Iterator[str]:
        """Events in their public JSON form, one a line, as they were told; of all runs where none is named."""
        for run in runs or [row.run for row in self.latest(-1)]:
            yield from self._find(run)[-1].split("\n")

    def _find(self, run: str) -> Sequence[Any]:
        where, value = ("? != '' ORDER BY began DESC", run) if run == "last" else ("run LIKE ? ORDER BY run", f"{run}%")
        found = self._query(f"SELECT {_COLUMNS}, events FROM runs WHERE {where} LIMIT 2", (value,))
        if not found:
            raise RequestError(f"there is no run {run!r} in {self._path}", hint="`moa-ray runs list` shows the latest")
        if len(found) > 1 and run != "last" and found[0][0] != run:  # the id itself comes before those that begin so
            raise RequestError(f"several runs begin with {run!r}", hint="give more of the id")
        row: Sequence[Any] = found[0]
        return row

    def _query(self, sql: str, values: tuple[Any, ...]) -> list[Any]:
        try:
            with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=_LOCKED_S)) as file:
                return file.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise RequestError(f"{self._path}: cannot be read as records of runs: {error}") from None


def _row(values: Sequence[Any]) -> RunRow:
    told = dict(zip(_COLUMNS.split(", "), values, strict=True))
    return RunRow(**{**told, "asked": tuple(json.loads(told["asked"]))})
