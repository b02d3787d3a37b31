"""Bodies of the requests, in OpenAI's words.

What a field means to a model is OpenAI's business; here stands what is accepted, and how it becomes messages and
`RunOptions`. Fields that are not listed are passed over, as clients send many that concern OpenAI alone.
"""

from __future__ import annotations

from math import inf
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator

from moa_ray.engines.protocol import Sampling
from moa_ray.errors import RequestError
from moa_ray.graph import Message
from moa_ray.runtime import RunOptions

_Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Temperature = Annotated[float, Field(ge=0, le=2)]
_Share = Annotated[float, Field(ge=0, le=1)]
_PASSED_ON = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "frequency_penalty", "presence_penalty")
_UNSUPPORTED = ("functions", "function_call", "audio", "logprobs", "top_logprobs")


class TextPart(BaseModel):
    """A piece of text in a message made of parts."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class _Turn(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    def message(self) -> Message:
        """The turn as the rest of moa-ray has it."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatMessage(_Turn):
    """One turn of a conversation."""

    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def message(self) -> Message:
        """The turn as the rest of moa-ray has it."""
        message = super().message()
        if self.name:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class MoAOptions(BaseModel):
    """What a request may ask of the graph itself, within the limits that its deployer set."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    drafts: bool | None = None
    """Whether the proposals are sent as reasoning."""
    k: PositiveInt | list[PositiveInt] | None = None
    """Ask only the first `k` agents of each layer; a list says it layer by layer."""
    policy: dict[str, Any] = Field(default_factory=dict)
    """Keys of the graph's `policy` with other values."""
    call: str | None = None
    """Make this one call of the graph alone, by its id in `GET /v1/graphs/{name}`; `answer` is the aggregator."""
    proposals: dict[str, str] = Field(default_factory=dict)
    """What that call is shown, by the id of the call that wrote it."""


class _Request(BaseModel):
    model: str = Field(min_length=1)
    stream: bool | None = False
    temperature: _Temperature | None = None
    top_p: _Share | None = None
    moa: MoAOptions = MoAOptions()

    @field_validator("moa", mode="before")
    @classmethod
    def _no_null(cls, value: Any) -> Any:
        return {} if value is None else value

    def _run_options(self, sampling: Sampling, extra: dict[str, Any]) -> RunOptions:
        k = tuple(self.moa.k) if isinstance(self.moa.k, list) else self.moa.k
        return RunOptions(
            answer_flush_s=0.0 if self.stream else inf,
            agent=self.model.partition("/")[2] or None,
            sampling=sampling,
            extra=extra,
            k=k,
            policy=self.moa.policy,
            call=self.moa.call,
            proposals=self.moa.proposals,
        )


class StreamOptions(BaseModel):
    """How to stream."""

    include_usage: bool | None = False


class ChatRequest(_Request):
    """Body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {"model": "quickstart", "messages": [{"role": "user", "content": "Why is the sky blue?"}]},
                {"model": "quickstart", "messages": [{"role": "user", "content": "And now?"}], "stream": True, "n": 2},
            ]
        },
    )

    messages: list[ChatMessage] = Field(min_length=1)
    stream_options: StreamOptions | None = None
    n: PositiveInt | None = Field(None, le=128)
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None

    @property
    def conversation(self) -> list[Message]:
        """The turns as the rest of moa-ray has them."""
        return [message.message() for message in self.messages]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def run_options(self) -> RunOptions:
        """How the run is wanted.

        Raises:
            RequestError: For a field that cannot be honoured.
        """
        further = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        for name in _UNSUPPORTED:
            if further.get(name):
                raise RequestError(f"{name}: not supported")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = Sampling(
            self.temperature, self.top_p, self.max_completion_tokens or self.max_tokens, self.seed, stop
        )
        return self._run_options(sampling, {name: further[name] for name in _PASSED_ON if name in further})


class InputItem(_Turn):
    """One turn in the input of a response."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]


class ResponsesRequest(_Request):
    """Body of `POST /v1/responses`: text in, text out; nothing is stored."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"examples": [{"model": "quickstart", "input": "Why is the sky blue?"}]}
    )

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: _Tokens | None = None
    top_logprobs: NonNegativeInt | None = None

    @property
    def conversation(self) -> list[Message]:
        """The turns as the rest of moa-ray has them."""
        turns: list[Message] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*turns, {"role": "user", "content": self.input}]
        return [*turns, *(item.message() for item in self.input)]

    def run_options(self) -> RunOptions:
        """How the run is wanted.

        Raises:
            RequestError: For a field that cannot be honoured.
        """
        further = self.model_extra or {}
        for name in ("previous_response_id", "conversation", "background", "tools", "prompt"):
            if further.get(name):
                raise RequestError(
                    f"{name}: not supported", hint="/v1/chat/completions takes tools and whole histories"
                )
        return self._run_options(Sampling(self.temperature, self.top_p, self.max_output_tokens), {})
