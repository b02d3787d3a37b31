"""What both clients share: requests, errors, and when to try again. No input or output in here."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import httpx2
import tenacity

from moa_ray import errors
from moa_ray.client.answer import Answer
from moa_ray.errors import MoARayError, ModelNotFound, RequestError, ServerUnreachable

Messages = Iterable[Mapping[str, Any]]
_LONGEST_PAUSE_S = 8.0
_LONGEST_WISHED_PAUSE_S = 60.0
_CONNECT_TIMEOUT_S = 5.0


class Asked(TypedDict, total=False):
    """What may be said of a question beside itself.

    Args:
        model: A graph, or `graph/agent`, in place of the client's own.
        drafts: Whether the answer brings the proposals.
        k: Ask only the first `k` agents of each layer; a list says it layer by layer.
        policy: Keys of the graph's policy with other values, within its deployer's limits.
        call: Make this one call of the graph alone, by its id; `answer` is the aggregator.
        proposals: What that call is shown, by the id of the call that wrote it.

    The others are OpenAI's, for the aggregator.
    """

    model: str | None
    drafts: bool
    k: int | list[int] | None
    policy: Mapping[str, Any] | None
    call: str | None
    proposals: Mapping[str, str] | None
    temperature: float | None
    top_p: float | None
    max_tokens: int | None
    seed: int | None
    stop: str | list[str] | None
    frequency_penalty: float | None
    presence_penalty: float | None
    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    parallel_tool_calls: bool | None
    response_format: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Settings:
    """How a client is set.

    Args:
        base_url: The server's, `/v1` included.
        api_key: Its key.
        timeout_s: Longest silence of the server, in seconds.
        retries: Times that a request is tried again.
    """

    base_url: str
    api_key: str | None
    timeout_s: float
    retries: int

    def http(self) -> dict[str, Any]:
        """Arguments of the HTTP client."""
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = httpx2.Timeout(self.timeout_s, connect=min(_CONNECT_TIMEOUT_S, self.timeout_s))
        return {"base_url": self.base_url.rstrip("/"), "headers": headers, "timeout": timeout}

    def retrying(self) -> dict[str, Any]:
        """Arguments of the retry loop."""
        return {
            "retry": tenacity.retry_if_exception(lambda error: isinstance(error, MoARayError) and error.retryable),
            "wait": _pause_s,
            "stop": tenacity.stop_after_attempt(1 + self.retries),
            "reraise": True,
        }


def _pause_s(state: tenacity.RetryCallState) -> float:
    """What the server asked for, else exponential back-off with jitter."""
    error = state.outcome.exception() if state.outcome else None
    wished = getattr(error, "retry_after_s", None)
    if wished is not None:
        return float(min(wished, _LONGEST_WISHED_PAUSE_S))
    return random.uniform(0.5, 1.0) * min(_LONGEST_PAUSE_S, 0.5 * 2.0 ** (state.attempt_number - 1))


def body_of(model: str, prompt: str | Messages, asked: Asked, *, stream: bool) -> dict[str, Any]:
    """Body of a chat completion.

    Raises:
        RequestError: For options that there are not.
    """
    if unknown := sorted(asked.keys() - Asked.__annotations__.keys()):
        raise RequestError(f"unknown option: {', '.join(unknown)}", hint=f"known: {', '.join(Asked.__annotations__)}")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    moa = {
        "drafts": asked.get("drafts", False),
        "k": asked.get("k"),
        "policy": dict(asked.get("policy") or {}),
        "call": asked.get("call"),
        "proposals": dict(asked.get("proposals") or {}),
    }
    streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    options = {name: value for name, value in asked.items() if name not in ("model", *moa)}
    return {"model": model, "messages": messages, "moa": moa, **streaming, **options}


def feedback_of(answer: Answer | str, reward: float, choice: int) -> dict[str, Any]:
    """Body of a judgement.

    Raises:
        RequestError: For a reward that is no number from 0 to 1.
    """
    if not 0 <= reward <= 1:
        raise RequestError(f"a reward is a number from 0 to 1, not {reward}")
    return {"id": answer if isinstance(answer, str) else answer.id, "reward": float(reward), "choice": choice}


def first(models: list[str]) -> str:
    """The model that is meant where none is named.

    Raises:
        ModelNotFound: If there is none.
    """
    if not models:
        raise ModelNotFound("the server has no model")
    return models[0]


def check(response: httpx2.Response) -> httpx2.Response:
    """`response`, read already, unless it tells of an error.

    Raises:
        MoARayError: The one that the server met, or the nearest.
    """
    if not response.is_error:
        return response
    try:
        told = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        told = {"message": f"{response.request.url} answered {response.status_code}: {response.text[:200]}"}
    error = error_of(told, response.status_code)
    if response.headers.get("x-should-retry") == "false":
        error.__dict__["retryable"] = False  # of this one alone, whatever its class says
    if (after := response.headers.get("retry-after", "")).isdecimal():
        error.retry_after_s = float(after)
    raise error


_BY_CODE = {
    cls.openai_code: cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, MoARayError) and "openai_code" in vars(cls)
}


def error_of(told: Mapping[str, Any], status: int = 500) -> MoARayError:
    """An error as the server told it."""
    message = str(told.get("message") or told)
    if request_id := told.get("request_id"):
        message = f"{message} [request {request_id}]"
    cls = _BY_CODE.get(str(told.get("code")))
    if cls is not None:
        return cls(message)
    return ServerUnreachable(message) if status >= 500 or status in (408, 429) else RequestError(message)


def unreachable(error: httpx2.HTTPError, settings: Settings) -> ServerUnreachable:
    """What the network did, as an error of ours."""
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
        return ServerUnreachable(f"nobody answers at {settings.base_url}: {error}", hint="is it served there?")
    if isinstance(error, httpx2.TimeoutException):
        silent = ServerUnreachable(
            f"{settings.base_url} was silent for {settings.timeout_s:g} s", hint="raise timeout_s, or use stream()"
        )
        silent.__dict__["retryable"] = False  # it may be at work still
        return silent
    return ServerUnreachable(f"the connection to {settings.base_url} broke: {error or type(error).__name__}")


def chunk_of(line: str) -> dict[str, Any] | None:
    """The chunk in a line of an event stream; None for what is none.

    Raises:
        MoARayError: If the line tells of one.
    """
    if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
        return None
    chunk: dict[str, Any] = json.loads(data)
    if "error" in chunk:
        raise error_of(chunk["error"])
    return chunk
