"""What engines that speak OpenAI's protocol have in common: the fields of a request, and a stream read as chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from moa_ray.engines.protocol import Chunk, FinishReason, Sampling, Usage
from moa_ray.errors import EngineUnavailable

_FINISH: dict[str, FinishReason] = {"length": "length", "tool_calls": "tool_calls"}


def fields_of(sampling: Sampling) -> dict[str, Any]:
    """OpenAI's names of what is set."""
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "stop": list(sampling.stop) or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def is_chunk(event: Any) -> bool:
    """Whether the JSON of an event has the shape of a `chat.completion.chunk`, as far as it is read here."""
    return (
        isinstance(event, dict)
        and isinstance(event.get("usage") or {}, dict)
        and isinstance(choices := event.get("choices") or [], list)
        and all(isinstance(choice, dict) and isinstance(choice.get("delta") or {}, dict) for choice in choices)
    )


def usage_of(counts: dict[str, Any]) -> Usage:
    """OpenAI's `usage` as ours."""
    cached = (counts.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(counts.get("prompt_tokens") or 0, counts.get("completion_tokens") or 0, cached)


def logprob_of(choice: dict[str, Any]) -> float | None:
    """Sum of the log-probabilities that a choice of an event tells; None where it tells none."""
    told = (choice.get("logprobs") or {}).get("content")
    return sum(token["logprob"] for token in told) if told else None


async def chunks_of(events: AsyncIterator[dict[str, Any]], prompt_tokens: int) -> AsyncIterator[Chunk]:
    """The chunks of a streamed chat completion, given the JSON of its events.

    A piece of text counts as one token, unless the event says how many there were so far.

    Args:
        events: `chat.completion.chunk` objects.
        prompt_tokens: What to book where the stream tells no usage.

    Raises:
        EngineUnavailable: If the stream ends without a finish reason.
    """
    finish: FinishReason | None = None
    usage: Usage | None = None
    tokens = 0
    async for event in events:
        if event.get("usage"):
            usage = usage_of(event["usage"])
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text, tool_calls = delta.get("content") or "", tuple(delta.get("tool_calls") or ())
            if text or tool_calls:
                new = usage.completion_tokens - tokens if usage else 1
                tokens += new
                yield Chunk(text, new, tool_calls=tool_calls, logprob=logprob_of(choice))
            if reason := choice.get("finish_reason"):
                finish = _FINISH.get(reason, "stop")
    if finish is None:
        raise EngineUnavailable("the endpoint's stream ended before the answer did")
    yield Chunk(finish_reason=finish, usage=usage or Usage(prompt_tokens, tokens))
