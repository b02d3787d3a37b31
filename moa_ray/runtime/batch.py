"""Many requests from one file into another, so that whatever happens each is answered exactly once.

Every line of the input is a JSON object with `prompt`, or with `messages` as OpenAI has them. Every answer is one line
appended to the output, as soon as it is there, with the number and a hash of its input. A process that is killed
leaves at most half a line at the end, which the next one removes before it goes on with what is missing. A line that
is no request is kept in the output with its error; one whose request failed is not, and so is asked again next time.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from moa_ray.errors import MoARayError, RequestError, SpecError
from moa_ray.graph import Message, conversation
from moa_ray.runtime.ledger import RunResult

Ask = Callable[[list[Message]], Awaitable[RunResult]]
"""Answers one conversation."""
_OTHER = "the input has changed since; name another output file"


@dataclass(slots=True)
class Tally:
    """How a batch stands, in lines.

    Args:
        total: All of the input.
        answered: With an answer in the output.
        bad: That are no requests; they are in the output, too.
        failed: Whose request failed.
    """

    total: int = 0
    answered: int = 0
    bad: int = 0
    failed: int = 0


class Watch(Protocol):
    """Who is told how a batch goes on."""

    def began(self, tally: Tally) -> None:
        """What is there already has been counted."""
        ...

    def ended(self, tally: Tally, line: int, error: MoARayError | None) -> None:
        """One more line is done, or failed with `error`."""
        ...


async def batch(ask: Ask, source: Path, target: Path, *, concurrency: int, watch: Watch) -> Tally:
    """Answer every line of `source` that `target` holds nothing for.

    Args:
        ask: Answers one conversation.
        source: JSON lines.
        target: JSON lines; made where it is not there.
        concurrency: Requests in flight at once.
        watch: Told of every line.

    Raises:
        SpecError: If a file cannot be read or written, `target` belongs to another input, or another batch runs on it.
    """
    with _reading(source) as lines, _appending(target) as out:
        tally = Tally()
        done = _resume(out, target, tally)
        tally.total = _check(lines, done, source, target)
        watch.began(tally)
        lines.seek(0)
        missing = ((number, line) for number, line in _numbered(lines) if number not in done)

        async def work() -> None:
            for number, line in missing:  # shared: every worker takes the next one
                error: MoARayError | None = None
                head: dict[str, Any] = {"line": number, "input": _hash(line)}
                try:
                    request = _request(line)
                    head |= {"id": request["id"]} if "id" in request else {}
                    messages = conversation(request["messages"] if "messages" in request else request["prompt"])
                    _write(out, head | _answer(await ask(messages)))
                    tally.answered += 1
                except RequestError as caught:
                    error = caught
                    _write(out, head | {"error": error.openai_code, "message": error.message})
                    tally.bad += 1
                except MoARayError as caught:
                    error = caught
                    tally.failed += 1
                watch.ended(tally, number, error)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    return tally


def _answer(result: RunResult) -> dict[str, Any]:
    return {
        "text": result.text,
        "usage": asdict(result.usage),
        "source": result.source,
        "note": result.note,
        "seconds": round(result.total_s, 6),
    }


def _request(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except ValueError as error:
        raise RequestError(f"this is no JSON: {error}") from None
    if not isinstance(request, dict) or not {"prompt", "messages"} & request.keys():
        raise RequestError('a line is an object with "prompt" or "messages"')
    return request


# ---------------------------------------------------------------- files


@contextmanager
def _reading(source: Path) -> Iterator[IO[bytes]]:
    try:
        file = source.open("rb")
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", file=str(source)) from None
    with file:
        yield file


@contextmanager
def _appending(target: Path) -> Iterator[IO[bytes]]:
    """The output, for this process alone; every write reaches the kernel at once, and so survives us."""
    try:
        file = target.open("a+b", buffering=0)
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror}", file=str(target)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpecError("another batch writes to it", file=str(target)) from None
        yield file


def _resume(out: IO[bytes], target: Path, tally: Tally) -> dict[int, str]:
    """Hashes of the lines that are done, by number. Half a line at the end is removed."""
    done: dict[int, str] = {}
    end = 0
    with _reading(target) as written:
        for line in written:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            record = _record(line, target)
            done[record["line"]] = record["input"]
            tally.answered += "text" in record
            tally.bad += "error" in record
    out.truncate(end)
    return done


def _record(line: bytes, target: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
        if record["line"] and record["input"] and ("text" in record or record["error"]):
            return record
    except (ValueError, TypeError, KeyError):
        pass
    raise SpecError("this is not the output of a batch", file=str(target), hint="name another output file")


def _check(lines: IO[bytes], done: dict[int, str], source: Path, target: Path) -> int:
    """How many lines there are; what is done must be among them."""
    total, left = 0, dict(done)
    for number, line in _numbered(lines):
        total += 1
        if left.pop(number, known := _hash(line)) != known:
            raise SpecError(f"{target} answers another line", file=str(source), line=number, hint=_OTHER)
    if left:
        raise SpecError(f"{target} answers line {min(left)}, which is not there", file=str(source), hint=_OTHER)
    return total


def _numbered(lines: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers in the file."""
    for number, line in enumerate(lines, start=1):
        if stripped := line.strip():
            yield number, stripped


def _write(out: IO[bytes], record: dict[str, Any]) -> None:
    out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]
