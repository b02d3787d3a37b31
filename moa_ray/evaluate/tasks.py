"""Questions to be answered: GSM8K, MT-Bench, any JSON lines, a data set of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_ray.errors import MoARayError, RequestError
from moa_ray.evaluate.scorers import scorer as scorer_of
from moa_ray.graph import Message, conversation

_HUB = "hf:"
_SHAPE = 'a line is {"prompt": …}, {"messages": […]}, {"turns": […]} or {"question": …}'


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Args:
        id: Its name in the data set.
        messages: What is asked.
        follow_ups: What the user says after the first answer, and after each one that follows.
        references: Right answers; none where a judge decides.
        category: What it is about, where the data set says so.
    """

    id: str
    messages: tuple[Message, ...]
    follow_ups: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    category: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """A data set.

    Args:
        name: Where it comes from.
        items: Its questions.
        scorer: Who compares answers with references; None where a judge is needed.
        problems: Lines that are no question, with file, line and why: left out, and told.
    """

    name: str
    items: tuple[Item, ...]
    scorer: str | None
    problems: tuple[str, ...] = ()


def load(source: str, *, scorer: str | None = None, limit: int | None = None) -> Task:
    """The data set at `source`.

    A line has what is asked (`prompt`, `messages`, `turns` as in MT-Bench, or `question` as in GSM8K), and may have
    `reference`, `references` or `answer`, `category`, and `id` or `question_id`.

    Args:
        source: A file of JSON lines, or `hf:NAME`, `hf:NAME:CONFIG:SPLIT`.
        scorer: Who scores. Not given: `number` where references end as GSM8K's do, `exact` for other references,
            a judge where there are none.
        limit: Use so many items, the first.

    Raises:
        RequestError: If it cannot be read, holds no question, or there is no such scorer.
    """
    if scorer:
        scorer_of(scorer)
    rows = _from_hub(source.removeprefix(_HUB)) if source.startswith(_HUB) else rows_of(Path(source))
    items: dict[str, Item] = {}
    problems: list[str] = []
    for where, row in rows:
        if limit is not None and len(items) >= limit:
            break
        try:
            item = _item(row, str(len(items) + len(problems) + 1))
            if item.id in items:
                raise RequestError(f"the id {item.id!r} stands twice")
            if scorer and not item.references:
                raise RequestError(f"there is no reference, and {scorer} needs one")
        except MoARayError as error:
            problems.append(f"{where}: {error.message}")
            continue
        items[item.id] = item
    if not items:
        first = f"; the first problem: {problems[0]}" if problems else ""
        raise RequestError(f"{source}: there is no question in it{first}", hint=_SHAPE)
    return Task(Path(source).stem, tuple(items.values()), scorer or _scorer_for(items.values()), tuple(problems))


def _scorer_for(items: Iterable[Item]) -> str | None:
    answers = [reference for item in items for reference in item.references or ("",)]
    if all("####" in answer for answer in answers):
        return "number"
    return "exact" if all(answers) else None


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line of a file of JSON lines with where it stands; None in place of what is no JSON.

    Raises:
        RequestError: If the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a JSON string may hold other line separators
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path}: the file is not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError:
                yield f"{path}:{number}", None


def _from_hub(name: str) -> Iterator[tuple[str, Any]]:
    import datasets

    path, config, split = (*name.split(":"), "", "")[:3]
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "test")
    except Exception as error:  # the library raises whatever its readers do
        raise RequestError(f"hf:{name}: cannot be loaded: {error}", hint="write hf:NAME:CONFIG:SPLIT") from None
    for number, row in enumerate(rows, start=1):
        yield f"{_HUB}{name}:{number}", row


def _item(row: Any, number: str) -> Item:
    messages, follow_ups = asked_in(row)
    found = row.get("references") or row.get("reference") or row.get("answer") or ()
    references = tuple(map(str, found if isinstance(found, list) else [found] if found != () else ()))
    if any(not reference.strip() for reference in references):
        raise RequestError("a reference is empty")
    name = row.get("id", row.get("question_id", number))
    return Item(str(name), messages, follow_ups, references, str(row.get("category") or ""))


def asked_in(row: Any) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """What a line asks, and what its user says after the first answer.

    Raises:
        RequestError: If it asks nothing.
    """
    if not isinstance(row, Mapping):
        raise RequestError("this is no JSON object", hint=_SHAPE)
    try:
        turns = row.get("turns") or [row.get("prompt") or row.get("messages") or row.get("question") or ""]
        if not isinstance(turns, list):
            raise TypeError("turns")
        messages = tuple(conversation(turns[0]))
        follow_ups = tuple(conversation(turn)[0]["content"] for turn in turns[1:])
        json.dumps([messages, follow_ups], ensure_ascii=False).encode()  # half of a surrogate pair cannot be sent
        return messages, follow_ups
    except (ValueError, TypeError, AttributeError, KeyError):
        raise RequestError("this is no question", hint=_SHAPE) from None
