"""A graph over a Ray Data set: `dataset.map_batches(MoAProcessor, ...)`.

Answers are kept in a folder, in the form of `moa-ray batch`: a line of JSON as soon as an answer is there. A pipeline
that is killed and started again takes what is there and asks the rest. Every actor writes a file of its own, so
nobody waits for another, and half a line at the end of one is nothing but an answer that is missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from moa_ray.client import AsyncClient
from moa_ray.errors import MoARayError, RequestError, SpecError
from moa_ray.integrations.asking import api_key
from moa_ray.integrations.needs import need

need("pyarrow", "pyarrow", "17.0", "ray-data")  # without it `ray.data` says less


@dataclass(frozen=True, slots=True)
class _Row:
    """What is known of a row: its answer, or why it has none."""

    text: str = ""
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class MoAProcessor:
    """Answers the rows of a data set: the class for `Dataset.map_batches`, in its default batch format.

    A row has `prompt`, or `messages` as OpenAI has them. It gets `moa_text`, `moa_error` ("" where there is an answer),
    `moa_prompt_tokens` and `moa_completion_tokens`. A row that fails fails alone. The server's key is the environment's
    `MOA_RAY_API_KEY`.

    Args:
        server: The server's base URL, `/v1` included.
        model: A graph, or `graph/agent`.
        requests: Requests that an actor has in flight at most.
        answers: Folder in which answers are kept, one that all nodes see; nothing is kept where not given. A row is
            known again by what it asks, and by its `id` where it has one: give rows that ask the same one each, if each
            is to be asked. A graph that says something else now needs another folder.
        asked: Whatever else `Client.run` takes.
    """

    def __init__(self, server: str, model: str, *, requests: int = 8, answers: str | None = None, **asked: Any) -> None:
        self._client = AsyncClient(server, api_key=api_key(), model=model)
        self._what = (model, asked)
        self._asked = asked
        self._turn = asyncio.Semaphore(requests)
        self._answers = _Answers(Path(answers)) if answers else None

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its answers."""
        if self._answers:
            self._answers.refresh()
        rows = await asyncio.gather(*map(self._answered, _rows(batch)))
        columns = {f"moa_{name}": [getattr(row, name) for row in rows] for name in _Row.__slots__}
        return {**batch, **columns}

    async def _answered(self, row: Mapping[str, Any]) -> _Row:
        try:
            messages = _messages(row)
            key = _hash([*self._what, str(row.get("id", "")), messages])
            if self._answers and (known := self._answers.get(key)):
                return known
            async with self._turn:
                answer = await self._client.run(messages, **self._asked)
        except MoARayError as error:
            return _Row(error=f"{error.openai_code}: {error.message}")
        done = _Row(answer.text, "", answer.usage.prompt_tokens, answer.usage.completion_tokens)
        if self._answers:
            self._answers.keep(key, done)
        return done


def _rows(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    asking = {name: batch[name] for name in ("id", "prompt", "messages") if name in batch}
    for number in range(len(next(iter(batch.values()), ()))):
        yield {name: _plain(column[number]) for name, column in asking.items()}


def _plain(value: Any) -> Any:
    """Python's own types; what Arrow fills in where one message has a key and another has not is left out."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    return value


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    match row:
        case {"messages": [*messages]} if messages and all(isinstance(each, dict) for each in messages):
            return messages
        case {"prompt": str(prompt)}:
            return [{"role": "user", "content": prompt}]
        case _:
            raise RequestError("a row has a text as `prompt`, or a list of messages as `messages`")


def _hash(asked: Any) -> str:
    try:
        told = json.dumps(asked, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RequestError(f"a row asks in what JSON does not know: {error}") from None
    return hashlib.sha256(told).hexdigest()[:32]


def _input(line: bytes, path: Path) -> str:
    try:
        return str(json.loads(line)["input"])
    except (ValueError, TypeError, KeyError):
        hint = "name a folder of its own"
        raise SpecError("these are no answers of a MoAProcessor", file=str(path), hint=hint) from None


class _Answers:
    """A folder of answers, written by many: what is in its files is found by hash, and read when it is wanted."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._mine = folder / f"{uuid4().hex}.jsonl"
        self._read: dict[Path, int] = {}
        self._places: dict[str, tuple[Path, int]] = {}

    def refresh(self) -> None:
        """Learn what has been written since."""
        for path in self._folder.glob("*.jsonl"):
            at = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(at)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._places[_input(line, path)] = (path, at)
                    at += len(line)
            self._read[path] = at

    def get(self, key: str) -> _Row | None:
        if key not in self._places:
            return None
        path, at = self._places[key]
        with path.open("rb") as file:
            file.seek(at)
            line = json.loads(file.readline())
        return _Row(line["text"], "", line["usage"]["prompt_tokens"], line["usage"]["completion_tokens"])

    def keep(self, key: str, row: _Row) -> None:
        usage = {"prompt_tokens": row.prompt_tokens, "completion_tokens": row.completion_tokens}
        line = {"input": key, "text": row.text, "usage": usage}
        with self._mine.open("ab", buffering=0) as file:  # the kernel has it at once, and so it survives us
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
