"""`/v1/responses`: events as a response, whole or as typed events. Text in, text out; nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from itertools import count
from math import inf
from typing import Any
from uuid import uuid4

from moa_ray.runtime import AnswerDelta
from moa_ray.server.chat import usage_of
from moa_ray.server.runs import Batch, Choice, account
from moa_ray.server.schemas import ResponsesRequest


class Response:
    """One request's answer.

    Args:
        request: What was asked.
    """

    drafts = False
    drafts_every_s = inf  # nobody is told of them

    def __init__(self, request: ResponsesRequest) -> None:
        self.choices = [Choice()]
        self._request = request
        self.id, self._item, self._created = f"resp_{uuid4().hex}", f"msg_{uuid4().hex}", int(time.time())
        self._numbers = count()

    def whole(self) -> dict[str, Any]:
        """The answer as one object, once all is booked."""
        return self._object(self._status)

    async def chunks(self, batches: AsyncGenerator[Batch | None, None]) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The answer as typed events; None where there is silence."""
        begun = False
        async for batch in batches:
            texts = [event.text for event in batch[1] if isinstance(event, AnswerDelta)] if batch else []
            if not begun and (texts or batch is None):
                begun = True
                yield self._event("response.created", response=self._object("in_progress"))
                yield self._event("response.in_progress", response=self._object("in_progress"))
                yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
                yield self._event("response.content_part.added", **self._place, part=_part(""))
            for text in texts:
                yield self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])
            if batch is None:
                yield None
        text, status = self._text, self._status
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._message(status, [_part(text)]))
        yield self._event(f"response.{status}", response=self._object(status))

    @property
    def _text(self) -> str:
        return "".join(self.choices[0].text)

    @property
    def _status(self) -> str:
        return "incomplete" if self.choices[0].finish_reason == "length" else "completed"

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, type: str, **fields: Any) -> dict[str, Any]:
        return {"type": type, "sequence_number": next(self._numbers), **fields}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _object(self, status: str) -> dict[str, Any]:
        over = status != "in_progress"
        request = self._request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": request.model,
            "output": [self._message(status, [_part(self._text)])] if over else [],
            "parallel_tool_calls": True,
            "store": False,
            "temperature": request.temperature,
            "tool_choice": "auto",
            "tools": [],
            "top_p": request.top_p,
            "usage": self._usage() if over else None,
            **({"moa": account(self.choices)} if over else {}),
        }

    def _usage(self) -> dict[str, Any]:
        usage = usage_of(self.choices)
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
