"""What an engine is to the rest of moa-ray: something that turns messages into a stream of text.

The runtime knows engines through `Engine` alone, so an engine in this process, in a Ray actor or
behind HTTP is the same thing to it. Everything here is a plain frozen dataclass that pickles small.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, Protocol, runtime_checkable

from moa_ray.graph.messages import Message

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw tokens; None leaves a value to the engine.

    `max_tokens` counts completion tokens. `temperature` 0 is greedy.
    """

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One call.

    Args:
        id: Unique name of the call, for logs and cancellation.
        messages: The whole prompt.
        sampling: How to draw tokens.
        flush_s: The longest time (seconds) that generated text may be held back to travel in
            fewer messages: 0 sends every token by itself, inf the whole answer as one message.
        flush_tokens: The most tokens that may be held back, whatever the time; None sets no such bound.
        agent: Name of the agent that asks; the scripted engine picks its script by it.
        extra: Further fields in OpenAI's words (`tools`, `tool_choice`, `response_format`), for engines that
            speak its protocol.
        continue_from: The beginning of the answer, which is to be continued and not repeated; only where the engine
            `continues`.
        affinity: Calls with the same key are best answered by the same replica; "" for any.
        avoid: Replicas not to ask while there are others.
    """

    id: str
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    flush_s: float = 0.0
    agent: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    continue_from: str = ""
    affinity: str = ""
    avoid: frozenset[str] = frozenset()
    flush_tokens: int | None = None

    @property
    def messages_to_continue(self) -> tuple[Message, ...]:
        """The prompt, with what there is of the answer as an assistant message at its end."""
        if not self.continue_from:
            return self.messages
        return (*self.messages, {"role": "assistant", "content": self.continue_from})


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call; `cached_tokens` is the part of `prompt_tokens` that needed no prefill."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer.

    Every chunk but the last has text or tool calls; the first may tell `replica` alone: who answers, where the
    engine has several. The last one has `finish_reason`, the call's `usage` and, where the engine held text back,
    `ttft_s`: seconds from the engine's receipt of the call to its first token, which the receiver could not see;
    `prefill_s`, where the engine knows it, is the part of that in which the prompt was read, and before it the call
    waited. `tool_calls` are deltas as OpenAI streams them. `logprob` is the sum of the log-probabilities of the piece's
    tokens, where `extra` asks for `logprobs` and the engine tells them.
    """

    text: str = ""
    tokens: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    ttft_s: float | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    replica: str = ""
    prefill_s: float | None = None
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine can do.

    Args:
        model: The model's name, for people.
        context_window: Prompt plus completion tokens that fit; None where unknown.
        prefix_cache: Whether a prompt that starts like an earlier one is cheaper.
        continues: Whether it takes a `continue_from`.
    """

    model: str
    context_window: int | None = None
    prefix_cache: bool = False
    continues: bool = False


@runtime_checkable
class Engine(Protocol):
    """One language model, ready to answer.

    `stream` yields chunks as they are generated and ends after one with a `finish_reason`.
    Closing the iterator early, or cancelling the task that reads it, stops the decoding at once.
    Failures are raised as `EngineError`s only.
    """

    async def info(self) -> EngineInfo:
        """What this engine can do; cheap after the first call."""
        ...

    def stream(self, request: EngineRequest, /) -> AsyncGenerator[Chunk, None]:
        """Answer `request`."""
        ...

    async def warm(self, request: EngineRequest, /) -> Usage:
        """Prefill the prompt of `request` so that a later call that starts with it begins sooner.

        It yields to calls that decode: an engine without room for both does nothing, and returns an empty `Usage`.
        """
        ...

    async def count_tokens(self, messages: tuple[Message, ...], /) -> int:
        """Prompt tokens that `messages` take, template included."""
        ...

    async def close(self) -> None:
        """Give back what the engine holds. Safe to call twice."""
        ...


@runtime_checkable
class HasHealth(Protocol):
    """An engine that can die while its process lives."""

    async def check_health(self) -> None:
        """Raise if it has."""
        ...


@runtime_checkable
class Completes(Protocol):
    """An engine to which a whole answer is less work than its pieces."""

    async def complete(self, request: EngineRequest, /) -> Chunk:
        """Answer `request` in one chunk, as the last one of `stream` with all text in it, and its `ttft_s`."""
        ...


NO_FLUSH = inf
"""`flush_s` of a call whose reader wants the whole answer as one message."""
