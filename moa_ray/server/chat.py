"""`/v1/chat/completions`: events as a chat completion, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from math import inf
from typing import Any
from uuid import uuid4

from moa_ray.engines.protocol import Usage
from moa_ray.runtime import AgentFinished, AnswerDelta, Event, RunFinished
from moa_ray.server.runs import Batch, Choice, account, draft_of
from moa_ray.server.schemas import ChatRequest


class Chat:
    """One request's answer.

    Args:
        request: What was asked.
        drafts: Whether proposals are sent as reasoning.
    """

    drafts_every_s = inf  # each when it is whole

    def __init__(self, request: ChatRequest, *, drafts: bool) -> None:
        self.choices = [Choice() for _ in range(request.n or 1)]
        self._request = request
        self.drafts = drafts
        self.id = f"chatcmpl-{uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": request.model}

    def whole(self) -> dict[str, Any]:
        """The answer as one object, once all is booked."""
        choices = [
            {"index": index, "message": self._message(choice), "logprobs": None, "finish_reason": choice.finish_reason}
            for index, choice in enumerate(self.choices)
        ]
        usage = usage_of(self.choices)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage,
            "moa": account(self.choices),
        }

    def _message(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not choice.tool_calls else None}
        if choice.tool_calls:
            message["tool_calls"] = choice.tool_calls
        return message | (_reasoning("".join(choice.drafts)) if self.drafts and choice.drafts else {})

    async def chunks(self, batches: AsyncGenerator[Batch | None, None]) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The answer in chunks; None where there is silence. The first chunk of a choice is its role."""
        silent = True
        async for batch in batches:
            number, events = batch or (0, [])
            deltas = [delta for event in events if (delta := self._delta(event))]
            if silent and (deltas or batch is None):
                silent = False
                for index in range(len(self.choices)):
                    yield self._chunk(index, {"role": "assistant", "content": ""})
            for delta in deltas:
                yield self._chunk(number, delta)
            if batch is None:
                yield None
            elif isinstance(events[-1], RunFinished) and not events[-1].error:
                yield self._chunk(number, {}, self.choices[number].finish_reason, last=self._is_last)
        if self._request.include_usage:
            usage = usage_of(self.choices)
            yield {**self._head, "object": _CHUNK, "choices": [], "usage": usage, "moa": account(self.choices)}

    @property
    def _is_last(self) -> bool:
        return not self._request.include_usage and all(choice.end for choice in self.choices)

    def _delta(self, event: Event) -> dict[str, Any]:
        match event:
            case AnswerDelta(tool_calls=()):
                return {"content": event.text}
            case AnswerDelta():
                return {"tool_calls": list(event.tool_calls)} | ({"content": event.text} if event.text else {})
            case AgentFinished() if self.drafts and (draft := draft_of(event)):
                return _reasoning(draft)
            case _:
                return {}

    def _chunk(
        self, index: int, delta: dict[str, Any], finish: str | None = None, *, last: bool = False
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = {**self._head, "object": _CHUNK, "choices": [choice]}
        return chunk | ({"moa": account(self.choices)} if last else {})


_CHUNK = "chat.completion.chunk"


def _reasoning(text: str) -> dict[str, str]:
    """Both names under which clients look for it."""
    return {"reasoning": text, "reasoning_content": text}


def usage_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of every call of every run; those that are not the answer's count as reasoning."""
    total = sum((choice.ledger.usage for choice in choices), Usage())
    return {
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "total_tokens": total.prompt_tokens + total.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": total.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
    }
