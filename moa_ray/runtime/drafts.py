"""Texts in the making: a consumer of a run's events that knows how far each call has come."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from moa_ray.runtime.events import (
    AgentCancelled,
    AgentDelta,
    AgentEvent,
    AgentFailed,
    AgentFinished,
    AgentPaused,
    AgentStarted,
    Event,
)


@dataclass(slots=True)
class Draft:
    """How far one call has come.

    Args:
        text: What there is of its text.
        tokens: Tokens of it.
        complete: Whether it is all.
        lost: Whether the call ended without one.
        flying: Numbers of the attempts under way.
    """

    text: str = ""
    tokens: int = 0
    complete: bool = False
    lost: bool = False
    flying: set[int] = field(default_factory=set)


class Drafts:
    """The drafts of one run, by call id."""

    def __init__(self) -> None:
        self._drafts: defaultdict[str, Draft] = defaultdict(Draft)
        self._news = asyncio.Event()

    def of(self, calls: Sequence[str]) -> list[Draft]:
        """The drafts of `calls` in their order, those that are lost left out."""
        return [draft for call in calls if not (draft := self._drafts[call]).lost]

    @property
    def news(self) -> asyncio.Event:
        """Set as soon as there is more of any draft than now, or one is complete or lost."""
        return self._news

    def add(self, event: Event) -> None:
        """Book one event."""
        if not isinstance(event, AgentEvent):
            return
        draft = self._drafts[event.call]
        match event:
            case AgentStarted():
                draft.flying.add(event.attempt)
                draft.lost = False
                draft.text = draft.text[: event.continued]
                draft.tokens = draft.tokens if event.continued else 0
                return
            case AgentDelta():
                draft.text += event.text
                draft.tokens += event.tokens
            case AgentPaused():
                draft.flying.discard(event.attempt)
                return
            case AgentFinished():
                draft.flying.discard(event.attempt)
                draft.text, draft.complete = event.text, True
            case AgentFailed() | AgentCancelled():
                draft.flying.discard(event.attempt)
                goes_on = draft.flying or (isinstance(event, AgentFailed) and event.will_retry)
                if goes_on:
                    return
                draft.lost = True
            case _:
                return
        self._news.set()
        self._news = asyncio.Event()
