"""Callers that ask over HTTP without a pause, and what became of each request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from moa_ray.client import AsyncClient, Delta
from moa_ray.errors import MoARayError
from moa_ray.graph import Graph, from_dict
from tests.conftest import until

TOKENS = 40
ANSWER = "".join(f"{n} " for n in range(1, TOKENS + 1))


def panel(engines: Mapping[str, Mapping[str, Any]], **policy: Any) -> Graph:
    """A graph whose proposers `a`, `b` and aggregator `chief` have an engine each; tokens are numbered."""
    usual = {"kind": "scripted", "model": "m", "ttft_s": 0.05, "itl_s": 0.01, "reply_tokens": TOKENS}
    return from_dict(
        {
            "version": 1,
            "name": "panel",
            "engines": {name: {**usual, **engines.get(name, {})} for name in ("a", "b", "chief")},
            "agents": {name: {"engine": name} for name in ("a", "b", "chief")},
            "layers": [["a", "b"]],
            "aggregator": "chief",
            "policy": {"retries": 5, "deadline_s": 60, **policy},
        }
    )


class Load:
    """Callers, every other one streaming.

    Args:
        url: Where the server answers.
        callers: How many ask at once; none tries again what failed.

    Attributes:
        found: How many requests ended in which way: `whole`; `failed before` anything of the answer came, or `failed
            after`; `corrupted`, where tokens were missing, doubled or wrong.
        errors: What callers were told.
        longest_s: The longest time in which no answer was completed.
    """

    def __init__(self, url: str, callers: int = 6) -> None:
        self._url = url
        self._callers = callers
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all_ask()), daemon=True)
        self.found: Counter[str] = Counter()
        self.errors: list[str] = []
        self.longest_s = 0.0

    def __enter__(self) -> Load:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive()

    async def _all_ask(self) -> None:
        async with AsyncClient(f"{self._url}/v1", retries=0, timeout_s=90) as client:
            await asyncio.gather(*(self._ask(client, stream=n % 2 == 0) for n in range(self._callers)))

    async def _ask(self, client: AsyncClient, *, stream: bool) -> None:
        while not self._stop.is_set():
            end = await (self._streamed(client) if stream else self._whole(client))
            self.found[end] += 1
            if end == "whole":
                now = time.monotonic()
                self.longest_s, self._last = max(self.longest_s, now - self._last), now
            else:
                await asyncio.sleep(0.2)  # as callers do; a refused connection costs no time

    async def _streamed(self, client: AsyncClient) -> str:
        text = ""
        try:
            async for event in client.stream("why?"):
                text += event.text if isinstance(event, Delta) else ""
        except MoARayError as error:
            self.errors.append(error.message)
            if not text:
                return "failed before"
            return "failed after" if ANSWER.startswith(text) else "corrupted"
        return "whole" if text == ANSWER else "corrupted"

    async def _whole(self, client: AsyncClient) -> str:
        try:
            answer = await client.run("why?")
        except MoARayError as error:
            self.errors.append(error.message)
            return "failed before"
        return "whole" if answer.text == ANSWER else "corrupted"

    def goes_on(self, answers: int = 20) -> None:
        """Wait until so many more whole answers have come; bounded."""
        wanted = self.found["whole"] + answers
        until(lambda: self.found["whole"] >= wanted, within_s=120)

    def lost_nothing(self, what: str) -> None:
        """Every answer was whole, whatever happened meanwhile; how long callers waited is printed."""
        print(f"{what}: {dict(self.found)}, at most {self.longest_s:.1f} s without an answer")
        assert self.found.keys() == {"whole"}, self.errors
