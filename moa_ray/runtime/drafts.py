"""Texts in the making: a consumer of a run's events that knows how far each call has come."""

from __future__ import annotations

import asyncio
from collections import defaultdict
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
        lost: Whether the call failed.
        paused: How its last stage went, where there was one.
        flying: Numbers of the attempts under way.
    """

    text: str = ""
    tokens: int = 0
    complete: bool = False
    lost: bool = False
    paused: AgentPaused | None = None
    flying: set[int] = field(default_factory=set)


class Drafts:
    """The drafts of one run, by call id."""

    def __init__(self) -> None:
        self._drafts: defaultdict[str, Draft] = defaultdict(Draft)
        self._news = asyncio.Event()

    def __getitem__(self, call: str) -> Draft:
        return self._drafts[call]

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
                draft.paused = event
                return
            case AgentFinished():
                draft.flying.discard(event.attempt)
                draft.text, draft.complete = event.text, True
            case AgentCancelled():  # for another attempt, or because nobody waits for it
                draft.flying.discard(event.attempt)
                return
            case AgentFailed():
                draft.flying.discard(event.attempt)
                if draft.flying or event.will_retry:
                    return
                draft.lost = True
            case _:
                return
        self._news.set()
        self._news = asyncio.Event()
