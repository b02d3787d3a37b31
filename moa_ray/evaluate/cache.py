"""Answers that were had before: each call by what it was asked, so that nothing is asked twice."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from moa_ray.engines._coalesce import joined
from moa_ray.engines.protocol import Chunk, Engine, EngineInfo, EngineRequest, Usage
from moa_ray.errors import RequestError
from moa_ray.graph import EngineSpec, Message

_FILE = "calls.sqlite"
_WAIT_S = 30.0


class Cache:
    """Values by the content that they answer to, in a file; each is there for good once it is put.

    Args:
        folder: Where the file is; made where it is not there.

    Attributes:
        hits: Values that were found.
        puts: Values that were put.

    Raises:
        RequestError: If the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(folder / _FILE, timeout=_WAIT_S, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise RequestError(f"{folder}: cannot be used as a cache: {error}") from None
        self.hits = self.puts = 0

    def get(self, key: str) -> Any:
        """The value of `key`; None where there is none."""
        found = self._file.execute("SELECT value FROM calls WHERE key = ?", (key,)).fetchone()
        self.hits += found is not None
        return json.loads(found[0]) if found else None

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value."""
        self._file.execute("INSERT OR REPLACE INTO calls VALUES (?, ?)", (key, json.dumps(value)))
        self.puts += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def content_of(spec: EngineSpec) -> dict[str, Any]:
    """What of an engine its answers depend on: neither where it runs, nor how often, nor its secrets."""
    told = spec.model_dump(mode="json", exclude={"replicas", "max_ongoing_requests", "resources"})
    return {key: value for key, value in told.items() if key not in ("api_key", "headers")}


def key_of(*parts: Any) -> str:
    """A name for JSON values, the same for the same."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a call took when it was made, in seconds.

    Args:
        ttft_s: To the first token; None where there was none.
        total_s: To the last.
    """

    ttft_s: float | None
    total_s: float


class CachedEngine:
    """An `Engine` that asks another one only what nobody asked before.

    A call is known by the engine, the agent, the prompt, the sampling with its seed, and further fields. Failures are
    not kept.

    Args:
        spec: The engine.
        cache: What was answered.
        live: The engine itself, started when it is first needed.

    Attributes:
        timings: Of each call by its id, as it was when it was made.
    """

    def __init__(self, spec: EngineSpec, cache: Cache, live: Callable[[], Awaitable[Engine]]) -> None:
        self._content = content_of(spec)
        self._cache = cache
        self._live = live
        self.timings: dict[str, Timing] = {}

    async def info(self) -> EngineInfo:
        """What the engine can do."""
        return EngineInfo(**await self._kept(["info"], self._ask_info))

    async def count_tokens(self, messages: tuple[Message, ...]) -> int:
        """Prompt tokens that `messages` take."""

        async def ask() -> int:
            return await (await self._live()).count_tokens(messages)

        count: int = await self._kept(["count", messages], ask)
        return count

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """The answer in one chunk where it is known, and as it comes where it is not."""
        extra = dict(request.extra)
        asked = [request.agent, request.messages, asdict(request.sampling), extra, request.continue_from]
        key = key_of("call", self._content, *asked)
        if (known := self._cache.get(key)) is not None:
            self.timings[request.id] = Timing(**known["timing"])
            yield Chunk(**known["chunk"] | {"usage": Usage(**known["chunk"]["usage"])})
            return
        engine, began = await self._live(), time.monotonic()
        first: float | None = None
        heard: list[Chunk] = []
        async with aclosing(engine.stream(request)) as chunks:
            async for chunk in chunks:
                heard.append(chunk)
                if first is None and (chunk.text or chunk.tool_calls):
                    first = chunk.ttft_s if chunk.ttft_s is not None else time.monotonic() - began
                if chunk.finish_reason:
                    timing = Timing(first, time.monotonic() - began)
                    whole = replace(joined(heard), usage=chunk.usage or Usage(), ttft_s=0.0, prefill_s=None, replica="")
                    self._cache.put(key, {"chunk": asdict(whole), "timing": asdict(timing)})
                    self.timings[request.id] = timing
                yield chunk

    async def warm(self, request: EngineRequest) -> Usage:
        """Nothing: an answer may be known already, and its text does not depend on it."""
        return Usage()

    async def close(self) -> None:
        """The engine belongs to somebody else."""

    async def _ask_info(self) -> Mapping[str, Any]:
        return asdict(await (await self._live()).info())

    async def _kept(self, asked: list[Any], ask: Callable[[], Awaitable[Any]]) -> Any:
        key = key_of(self._content, *asked)
        known = self._cache.get(key)
        if known is None:
            known = await ask()
            self._cache.put(key, known)
        return known
