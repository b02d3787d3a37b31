"""What a client gets: a whole answer, or events that end with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moa_ray.errors import ServerUnreachable


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of all calls of all agents; `reasoning_tokens` is the part of the completion that is not the answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AgentCall:
    """What one call of one agent took.

    Args:
        call: Id of the call in the graph, such as `1/skeptic`.
        agent: Name of the agent.
        engine: Name of its engine.
        layer: Layer, from 1.
        state: `finished`, `failed` or `cancelled`.
        attempts: Times it was sent to the engine.
        retries: Those after a failure.
        hedges: Those that raced another one.
        cancelled: Those that were cut off.
        prompt_tokens: Of all attempts.
        completion_tokens: Of all attempts.
        cached_tokens: The part of the prompt that needed no prefill.
        warmed_tokens: Tokens of prefilling its prompt ahead.
        started_s: Seconds from the run's start.
        ttft_s: Seconds from the successful attempt's start to its first token.
        seconds: Seconds it took, retries included.
        error: Why it failed, "" where it did not.
        dollars: What its tokens cost; None where its engine has no price.
    """

    call: str
    agent: str
    engine: str
    layer: int
    state: str
    attempts: int
    retries: int
    hedges: int
    cancelled: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    warmed_tokens: int
    started_s: float
    ttft_s: float | None
    seconds: float
    error: str
    dollars: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer.

    Args:
        text: The answer.
        model: Who gave it.
        id: The server's id of it.
        request_id: The server's id of the request, for its logs.
        finish_reason: `stop`, `length` or `tool_calls`.
        usage: Tokens of all calls.
        agents: What each call took, in the order in which they started.
        drafts: The proposals, where they were asked for.
        tool_calls: Calls of the caller's tools, as OpenAI has them.
        ttft_s: Seconds from the run's start to the answer's first token, as the server saw it.
        total_s: Seconds to its last.
        note: What a reader should know of how the answer came about, "" for nothing.
        dollars: What the calls to engines with a price cost; None where no engine has one.
    """

    text: str
    model: str
    id: str
    request_id: str
    finish_reason: str
    usage: Usage
    agents: tuple[AgentCall, ...] = field(repr=False)
    drafts: str = field(repr=False)
    tool_calls: tuple[dict[str, Any], ...]
    ttft_s: float | None
    total_s: float | None
    note: str
    dollars: float | None


@dataclass(frozen=True, slots=True)
class Draft:
    """A finished proposal, under the id of its call; only where drafts were asked for."""

    text: str


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of the answer, or of calls to the caller's tools."""

    text: str
    tool_calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event."""

    answer: Answer


Event = Draft | Delta | Finished


class Assembly:
    """Makes events and the answer out of a stream's chunks.

    Args:
        request_id: The server's id of the request.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._text: list[str] = []
        self._drafts: list[str] = []
        self._tool_calls: list[dict[str, Any]] = []
        self._finish_reason = ""
        self._last: Mapping[str, Any] = {}

    def add(self, chunk: Mapping[str, Any]) -> list[Event]:
        """The events of one chunk."""
        self._last = {**self._last, **chunk}
        found: list[Event] = []
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if draft := delta.get("reasoning"):
                self._drafts.append(draft)
                found.append(Draft(draft))
            text, tool_calls = delta.get("content") or "", tuple(delta.get("tool_calls") or ())
            if text or tool_calls:
                self._text.append(text)
                self._tool_calls += tool_calls
                found.append(Delta(text, tool_calls))
            self._finish_reason = choice["finish_reason"] or self._finish_reason
        return found

    def finished(self) -> Finished:
        """The answer.

        Raises:
            ServerUnreachable: If the stream ended before it was whole.
        """
        if not self._finish_reason:
            raise ServerUnreachable("the stream ended before the answer did")
        message = {"content": "".join(self._text), "reasoning": "".join(self._drafts), "tool_calls": self._tool_calls}
        choice = {"message": message, "finish_reason": self._finish_reason}
        return Finished(answer_of({**self._last, "choices": [choice]}, self._request_id))


def answer_of(body: Mapping[str, Any], request_id: str) -> Answer:
    """The answer in a chat completion."""
    choice, account, usage = body["choices"][0], body.get("moa") or {}, body.get("usage") or {}
    message = choice["message"]
    run: Mapping[str, Any] = next(iter(account.get("runs", ())), {})
    names = [each.name for each in fields(AgentCall)]
    return Answer(
        text=message.get("content") or "",
        model=body["model"],
        id=body["id"],
        request_id=request_id,
        finish_reason=choice["finish_reason"],
        usage=Usage(
            usage.get("prompt_tokens", 0),
            usage.get("completion_tokens", 0),
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0),
        ),
        agents=tuple(AgentCall(**{name: row.get(name) for name in names}) for row in account.get("agents", ())),
        drafts=message.get("reasoning") or "",
        tool_calls=tuple(message.get("tool_calls") or ()),
        ttft_s=run.get("ttft_s"),
        total_s=run.get("total_s"),
        note=run.get("note", ""),
        dollars=run.get("dollars"),
    )
