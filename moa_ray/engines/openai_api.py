"""Any OpenAI-compatible endpoint, through the `openai` SDK.

The SDK makes the requests, without retries of its own: the runner's retry loop is the only one. Its stream, though,
builds a pydantic model for every token, which is three quarters of what a call costs in CPU
(`python -m benchmarks.openai_transport`); here the lines of the stream are read as the JSON that they are.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, cast

import httpx2
import openai
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, SecretStr

from moa_ray.engines._openai_stream import chunks_of, fields_of, is_chunk
from moa_ray.engines.protocol import Chunk, EngineInfo, EngineRequest, Usage
from moa_ray.errors import (
    ContextOverflow,
    EngineError,
    EngineOverloaded,
    EngineRefused,
    EngineTimeout,
    EngineUnavailable,
)
from moa_ray.graph.messages import Message
from moa_ray.graph.spec import Resources

_BYTES_PER_TOKEN = 3.5
"""Of English text, on the low side; an endpoint does not tell how it counts."""
_TOKENS_PER_MESSAGE = 4
_LONGEST_REASON = 300


class OpenAIOptions(BaseModel):
    """Keys of an engine of `kind: openai`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    base_url: str = Field("https://api.openai.com/v1", pattern=r"^https?://[^\s/]+")
    """The endpoint, `/v1` included."""
    api_key: SecretStr | None = None
    """Its key, most often `${SOME_KEY}`."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Further headers of every request."""
    context_window: PositiveInt | None = None
    """The model's window in tokens, where prompts should be fitted to it."""
    connect_timeout_s: PositiveFloat = 5.0
    """Longest time to connect."""
    idle_timeout_s: PositiveFloat = 60.0
    """Longest silence: before the first token, and between two."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, such as `{top_k: 40}`."""
    prefix_cache: bool = False
    """Whether the endpoint keeps the beginnings of prompts, and `overlap` and `staircase` may fill that cache ahead:
    by requests of one token, which are charged for their prompts."""
    continues: bool = False
    """Whether the endpoint continues an assistant message at the end, so that an answer that broke off can go on."""
    continue_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of a request that continues; vLLM wants `{add_generation_prompt: false,
    continue_final_message: true}`."""


class OpenAIEngine:
    """An `Engine` behind HTTP.

    Args:
        model: The endpoint's model id.
        options: Where it is and how to reach it.
    """

    Options: ClassVar[type[BaseModel]] = OpenAIOptions

    def __init__(self, model: str, options: OpenAIOptions) -> None:
        self.model = model
        self.options = options
        self._secrets = [s.get_secret_value() for s in (options.api_key, *options.headers.values()) if s]
        self._client = openai.AsyncOpenAI(
            base_url=options.base_url,
            api_key=options.api_key.get_secret_value() if options.api_key else "none",
            default_headers={name: value.get_secret_value() for name, value in options.headers.items()},
            max_retries=0,
            timeout=httpx2.Timeout(options.idle_timeout_s, connect=options.connect_timeout_s),
        )

    @classmethod
    def default_resources(cls, options: BaseModel) -> Resources:
        """Nothing: the work is done elsewhere."""
        return Resources(num_cpus=0, num_gpus=0)

    @classmethod
    async def create(cls, model: str, options: BaseModel, *, num_cpus: float) -> OpenAIEngine:
        """An engine from its YAML; nothing is sent until the first call."""
        return cls(model, OpenAIOptions.model_validate(options))

    async def info(self) -> EngineInfo:
        """What the options say; an endpoint cannot be asked."""
        options = self.options
        return EngineInfo(self.model, options.context_window, options.prefix_cache, options.continues)

    async def count_tokens(self, messages: tuple[Message, ...]) -> int:
        """An estimate from the length of the text."""
        return _estimate(messages)

    async def warm(self, request: EngineRequest) -> Usage:
        """A request of one token where `prefix_cache` allows it, else nothing: every token is charged."""
        usage = Usage()
        if self.options.prefix_cache:
            one_token = replace(request, sampling=replace(request.sampling, max_tokens=1))
            async with aclosing(self.stream(one_token)) as chunks:
                async for chunk in chunks:
                    usage = chunk.usage or usage
        return usage

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """Stream one chat completion; closing the generator closes the connection, which stops the endpoint."""
        options = self.options
        continued = options.continue_body if request.continue_from else {}
        try:
            async with self._client.chat.completions.with_streaming_response.create(
                model=self.model,
                messages=cast(Any, list(request.messages_to_continue)),
                stream=True,
                stream_options={"include_usage": True},
                extra_body={**options.extra_body, **continued, **request.extra} or None,
                **fields_of(request.sampling),
            ) as response:
                events = self._events(response.iter_lines())
                async for chunk in chunks_of(events, _estimate(request.messages)):
                    yield chunk
        except (openai.APIError, httpx2.HTTPError, json.JSONDecodeError) as error:
            raise self._translated(error) from None

    async def _events(self, lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
        """The JSON of each server-sent event, up to the end mark."""
        async for line in lines:
            if line.startswith("data:"):
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if isinstance(event, dict) and event.get("error"):
                    raise EngineUnavailable(f"the endpoint broke off: {self._clean(_message(event))}")
                if not is_chunk(event):
                    raise EngineUnavailable(f"{self.options.base_url} sent an event that is no chat completion chunk")
                yield event

    # ------------------------------------------------------------------ errors

    def _translated(self, error: openai.APIError | httpx2.HTTPError | json.JSONDecodeError) -> EngineError:
        where = self.options.base_url
        match error:
            case openai.APITimeoutError() | httpx2.TimeoutException():
                return self._too_slow(error)
            case openai.APIStatusError():
                return self._status(error)
            case openai.APIConnectionError() | httpx2.ConnectError():
                reason = self._clean(str(error.__cause__ or error))
                return EngineUnavailable(f"cannot reach {where}: {reason}", hint="check base_url and the network")
            case json.JSONDecodeError():
                return EngineUnavailable(f"{where} sent something that is not JSON")
            case _:
                return EngineUnavailable(f"the connection to {where} broke: {self._clean(str(error))}")

    def _too_slow(self, error: Exception) -> EngineTimeout:
        options = self.options
        if isinstance(error.__cause__ or error, httpx2.ConnectTimeout):
            return EngineTimeout(f"no connection to {options.base_url} within {options.connect_timeout_s:g} s")
        return EngineTimeout(
            f"{options.base_url} was silent for {options.idle_timeout_s:g} s", hint="raise idle_timeout_s if it may be"
        )

    def _status(self, error: openai.APIStatusError) -> EngineError:
        status = error.status_code
        body = error.body if isinstance(error.body, dict) else {}
        said = self._clean(_message({"error": body} if body else {"error": error.response.reason_phrase}))
        message = f"{self.options.base_url} answered {status}: {said}"
        if status == 429:
            return EngineOverloaded(message, retry_after_s=_retry_after_s(error.response.headers))
        if status >= 500 or status in (408, 409):
            return EngineUnavailable(message, retry_after_s=_retry_after_s(error.response.headers))
        if body.get("code") == "context_length_exceeded" or "context length" in said:
            return ContextOverflow(message, hint="set the engine's context_window, and prompts are fitted to it")
        hint = {401: "check api_key", 403: "check api_key", 404: "check model and base_url"}.get(status, "")
        return EngineRefused(message, hint=hint)

    def _clean(self, text: str) -> str:
        """`text` in one line, without our secrets, which some endpoints repeat."""
        for secret in filter(None, self._secrets):
            text = text.replace(secret, "***")
        return " ".join(text.split())[:_LONGEST_REASON]


def _message(event: dict[str, Any]) -> str:
    error = event["error"]
    return str(error.get("message") or error) if isinstance(error, dict) else str(error)


def _estimate(messages: tuple[Message, ...]) -> int:
    return sum(_TOKENS_PER_MESSAGE + round(len(m["content"].encode()) / _BYTES_PER_TOKEN) for m in messages)


def _retry_after_s(headers: Any) -> float | None:
    """Seconds that the endpoint wants us to wait: a number, or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
