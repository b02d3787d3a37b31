"""From the events of one request's runs to what an answer is made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from moa_ray.graph import ANSWER
from moa_ray.runtime import AgentFinished, AnswerDelta, CallRecord, Event, Ledger, RunFinished, to_json

Batch = tuple[int, list[Event]]


async def merged(
    streams: Sequence[AsyncGenerator[list[Event], None]], choices: Sequence[Choice], silence_s: float
) -> AsyncGenerator[Batch | None, None]:
    """Batches of events of several runs with the run's number, as they come; None after each `silence_s` without any.

    Each event is booked with its run's choice first.

    Closing the generator, and the first error of a run, closes all of them.
    """
    pending = {asyncio.ensure_future(_next(stream)): number for number, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, timeout=silence_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield None
            for task in done:
                number = pending.pop(task)
                if batch := task.result():
                    pending[asyncio.ensure_future(_next(streams[number]))] = number
                    for event in batch:
                        choices[number].add(event)
                    yield number, batch
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[list[Event], None]) -> list[Event]:
    return await anext(stream, [])


class Follower(Protocol):
    """Another consumer of a run's events."""

    def add(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:
        """There will be no more."""


class Choice:
    """What is known of one run, a consumer of its events."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.text: list[str] = []
        self.tool_calls: list[dict[str, Any]] = []
        self.drafts: list[str] = []
        self.followers: list[Follower] = []

    def add(self, event: Event) -> None:
        """Book one event, and tell the followers."""
        for follower in self.followers:
            follower.add(event)
        self.ledger.add(event)
        match event:
            case AnswerDelta():
                self.text.append(event.text)
                for delta in event.tool_calls:
                    _merge(self.tool_calls, delta)
            case AgentFinished() if draft := draft_of(event):
                self.drafts.append(draft)
            case _:
                pass

    @property
    def end(self) -> RunFinished | None:
        """The run's last event, once it came."""
        return self.ledger.end

    def close(self) -> None:
        """There will be no more events."""
        for follower in self.followers:
            follower.close()

    @property
    def finish_reason(self) -> str:
        """Why the answer ended."""
        return (self.end.finish_reason if self.end else None) or "stop"

    @property
    def reasoning_tokens(self) -> int:
        """Completion tokens that are not the answer's."""
        source = self.end.source if self.end else ""
        return sum(record.usage.completion_tokens for record in self.ledger.records if record.call != source)


def draft_of(event: AgentFinished) -> str:
    """A finished proposal as a piece of reasoning; "" for the answer itself."""
    return "" if event.call == ANSWER else f"[{event.call}]\n{event.text.strip()}\n\n"


def _merge(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    """Add a streamed piece of a tool call to the call it belongs to."""
    index = delta.get("index", 0)
    while len(calls) <= index:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call, function = calls[index], delta.get("function") or {}
    call["id"] = delta.get("id") or call["id"]
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def account(choices: Sequence[Choice]) -> dict[str, Any]:
    """The `moa` object of an answer: each run, and what every call of every agent took."""
    ends = [choice.end for choice in choices if choice.end]
    gates = [to_json(choice.ledger.gate) for choice in choices if choice.ledger.gate]
    return {
        "runs": [
            {
                "run": end.run,
                "source": end.source,
                "note": end.note,
                "ttft_s": _s(end.ttft_s),
                "total_s": _s(end.t),
                **({} if end.dollars is None else {"dollars": end.dollars}),
            }
            for end in ends
        ],
        **({"gates": gates} if gates else {}),
        "agents": [_row(number, r) for number, choice in enumerate(choices) for r in choice.ledger.records],
    }


def _row(choice: int, record: CallRecord) -> dict[str, Any]:
    return {
        "choice": choice,
        "call": record.call,
        "agent": record.agent,
        "engine": record.engine,
        "layer": record.layer,
        "state": record.state,
        "attempts": record.attempts,
        "retries": record.retries,
        "hedges": record.hedges,
        "cancelled": record.cancelled,
        "prompt_tokens": record.usage.prompt_tokens,
        "completion_tokens": record.usage.completion_tokens,
        "cached_tokens": record.usage.cached_tokens,
        "warmed_tokens": record.warmed.prompt_tokens,
        "started_s": _s(record.started_s),
        "ttft_s": _s(record.ttft_s),
        "seconds": _s(record.seconds),
        "error": record.error,
        "dollars": record.dollars,
    }


def _s(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
