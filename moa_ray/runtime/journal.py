"""What has happened in one run: its events on their way to the reader, and its ledger."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any
from uuid import uuid4

from moa_ray.runtime.drafts import Drafts
from moa_ray.runtime.events import AgentDelta, AnswerDelta, Event
from moa_ray.runtime.ledger import Ledger

_GATHER_S = 0.01
"""Events that nobody waits for are held back so long, to cross an actor boundary in fewer messages."""


class Journal:
    """The events of one run, from those who tell them to the one who reads them.

    Args:
        deltas: Whether the reader wants the pieces of proposals.

    Attributes:
        run: The run's id.
        ledger: The account of all events so far.
        drafts: How far each call has come.
        answer: The pieces of the answer so far.
        answer_ttft_s: Seconds to the first of them; None while there is none.
    """

    def __init__(self, *, deltas: bool) -> None:
        self.run = f"run-{uuid4().hex[:12]}"
        self.ledger = Ledger()
        self.drafts = Drafts()
        self._deltas = deltas
        self.answer: list[str] = []
        self.answer_ttft_s: float | None = None
        self.clock = asyncio.get_running_loop().time
        self._started = self.clock()
        self._events: list[Event] = []
        self._something, self._urgent, self._ended = asyncio.Event(), asyncio.Event(), False

    @property
    def now(self) -> float:
        """Seconds since the run started."""
        return self.clock() - self._started

    def emit(self, event: Event) -> None:
        """Tell one event."""
        self.ledger.add(event)
        self.drafts.add(event)
        if isinstance(event, AgentDelta) and not self._deltas:
            return
        self._events.append(event)
        self._something.set()
        if isinstance(event, AnswerDelta):
            self._urgent.set()

    def emit_answer(self, text: str, tool_calls: tuple[dict[str, Any], ...] = ()) -> None:
        """Tell more of the answer."""
        if self.answer_ttft_s is None:
            self.answer_ttft_s = self.now
        self.answer.append(text)
        self.emit(AnswerDelta(self.run, self.now, text, tool_calls))

    async def batch(self) -> list[Event]:
        """The next events; none at the end."""
        await self._something.wait()
        if not self._urgent.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_GATHER_S):
                    await self._urgent.wait()
        events, self._events = self._events, []
        if not self._ended:
            self._something.clear()
            self._urgent.clear()
        return events

    def end(self) -> None:
        """There will be no more events."""
        self._ended = True
        self._something.set()
        self._urgent.set()
