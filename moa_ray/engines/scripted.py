"""An engine that plays a script: deterministic text, timing, failures and prefix cache, without a model.

It is the seam for tests of graphs, ours and users': what an agent says, how long it takes and how it
breaks are all set in the YAML. A token is a word with the white space behind it.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate, takewhile
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from moa_ray.engines.protocol import Chunk, EngineInfo, EngineRequest, FinishReason, Usage
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

_ERRORS: dict[str, type[EngineError]] = {
    "unavailable": EngineUnavailable,
    "timeout": EngineTimeout,
    "overloaded": EngineOverloaded,
    "refused": EngineRefused,
}
_REMEMBERED_PREFIXES = 100_000


class Fault(BaseModel):
    """A failure to play.

    It strikes the calls that match: of `agent` (any where not given), from call number `first` on
    (counted from 1 per agent), `times` of them (all where not given).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Literal["unavailable", "timeout", "overloaded", "refused", "hang"] = "unavailable"
    """The error to raise, or `hang`: no answer, for ever."""
    agent: str | None = None
    """Whose calls; not given: everybody's."""
    first: PositiveInt = 1
    """Number of the first call that fails."""
    times: PositiveInt | None = None
    """How many calls fail; not given: all from the first on."""
    after_tokens: NonNegativeInt = 0
    """Tokens that are still sent before it."""

    def strikes(self, agent: str, call: int) -> bool:
        """Whether call number `call` of `agent` fails."""
        wanted = self.agent is None or self.agent == agent
        return wanted and call >= self.first and (self.times is None or call < self.first + self.times)


class ToolCall(BaseModel):
    """A call of one of the caller's tools."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """The tool's name."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """What it is called with."""

    def delta(self, id: str) -> dict[str, Any]:
        """The call as OpenAI streams it."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments)}
        return {"index": 0, "id": id, "type": "function", "function": function}


class Stragglers(BaseModel):
    """Calls that are slow to begin, drawn at random."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    share: float = Field(ge=0, le=1)
    """Their share of all calls."""
    factor: PositiveFloat
    """On their time to first token."""
    seed: int = 0
    """Of the draw."""


class ScriptedOptions(BaseModel):
    """Keys of an engine of `kind: scripted`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    reply: str = "{agent} answers: {prompt}"
    """What is said. `{agent}`, `{call}` (that agent's call number) and `{prompt}` (the last message) are filled in."""
    replies: dict[str, str] = Field(default_factory=dict)
    """Replies of single agents, in place of `reply`."""
    tool_call: ToolCall | None = None
    """In place of a reply: a call of this tool, when the request offers tools and holds no result of one yet."""
    reply_tokens: PositiveInt | None = None
    """In place of a text: this many numbered tokens, `1 2 3 …`."""
    ttft_s: NonNegativeFloat = 0.0
    """Seconds to the first token."""
    itl_s: NonNegativeFloat = 0.0
    """Seconds between tokens (inter-token latency)."""
    prefill_s_per_token: NonNegativeFloat = 0.0
    """Seconds that each prompt token outside the prefix cache adds before the first token."""
    slowdown: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Factor on all times of single agents."""
    concurrency: PositiveInt | None = None
    """Calls served at once; more wait."""
    context_window: PositiveInt | None = None
    """Prompt plus completion tokens that fit."""
    logprob: float | None = Field(None, le=0)
    """Log-probability of each token, told where a call asks for `logprobs`."""
    continues: bool = True
    """Whether an answer that broke off can be continued."""
    stragglers: Stragglers | None = None
    """`{share, factor}`: a share of the calls that takes so many times as long to begin."""
    faults: tuple[Fault, ...] = ()
    """Failures to play."""


class Scripted:
    """An `Engine` that plays `ScriptedOptions`.

    Attributes:
        calls: Every request received, in order.
        decoded: Tokens decoded so far, also of calls that were cut off.
        active: Calls in flight.
    """

    Options: ClassVar[type[BaseModel]] = ScriptedOptions

    def __init__(self, options: ScriptedOptions | None = None, *, model: str = "scripted") -> None:
        self.options = options or ScriptedOptions()
        self.model = model
        self.calls: list[EngineRequest] = []
        self.decoded = 0
        self.active = 0
        self._calls_of: dict[str, int] = {}
        # Hashes of all prefixes of earlier prompts, the oldest first.
        self._prefixes: OrderedDict[int, None] = OrderedDict()
        self._random = random.Random(self.options.stragglers.seed if self.options.stragglers else 0)
        self._slots = asyncio.Semaphore(self.options.concurrency) if self.options.concurrency else None

    @classmethod
    def default_resources(cls, options: BaseModel) -> Resources:
        """Nothing: it only waits."""
        return Resources(num_cpus=0, num_gpus=0)

    @classmethod
    async def create(cls, model: str, options: BaseModel, *, num_cpus: float) -> Scripted:
        """An engine from its YAML; `num_cpus` is not needed."""
        return cls(ScriptedOptions.model_validate(options), model=model)

    async def info(self) -> EngineInfo:
        """What the script says; prefixes are always cached."""
        options = self.options
        return EngineInfo(self.model, options.context_window, prefix_cache=True, continues=options.continues)

    async def count_tokens(self, messages: tuple[Message, ...]) -> int:
        """One token a word, and one a role."""
        return len(_tokens_of(messages))

    async def warm(self, request: EngineRequest) -> Usage:
        """Take the prompt into the prefix cache, in the time that its prefill takes."""
        prompt = _tokens_of(request.messages)
        cached = self._prefill(prompt)
        await asyncio.sleep((len(prompt) - cached) * self.options.prefill_s_per_token)
        return Usage(len(prompt), 0, cached)

    async def close(self) -> None:
        """Nothing to give back."""

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """Play the script for one call, token by token."""
        async with self._admitted(request) as number, aclosing(self._play(request, number)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def complete(self, request: EngineRequest) -> Chunk:
        """Play the script for one call, and tell all of it when its last token is due."""
        clock = asyncio.get_running_loop().time
        received = clock()
        async with self._admitted(request) as number, aclosing(self._play(request, number, at_once=True)) as chunks:
            waited_s = clock() - received
            *pieces, last = [chunk async for chunk in chunks]
        text, tokens = "".join(piece.text for piece in pieces), sum(piece.tokens for piece in pieces)
        tool_calls = tuple(call for piece in pieces for call in piece.tool_calls)
        told = [piece.logprob for piece in pieces if piece.logprob is not None]
        ttft_s, logprob = waited_s + (last.prefill_s or 0.0), sum(told) if told else None
        return replace(last, text=text, tokens=tokens, tool_calls=tool_calls, ttft_s=ttft_s, logprob=logprob)

    @asynccontextmanager
    async def _admitted(self, request: EngineRequest) -> AsyncGenerator[int, None]:
        """Book a call and wait for a slot; yields the number of the call among its agent's."""
        self.calls.append(request)
        number = self._calls_of[request.agent] = self._calls_of.get(request.agent, 0) + 1
        self.active += 1
        try:
            async with self._slots or nullcontext():
                yield number
        finally:
            self.active -= 1

    async def _play(self, request: EngineRequest, number: int, *, at_once: bool = False) -> AsyncGenerator[Chunk, None]:
        options = self.options
        prompt = [*_tokens_of(request.messages), *request.continue_from.split()]
        self._check_window(len(prompt))
        fault = next((fault for fault in options.faults if fault.strikes(request.agent, number)), None)
        cached = self._prefill(prompt)

        answered = any(message["role"] == "tool" for message in request.messages)
        if options.tool_call and request.extra.get("tools") and not answered:
            yield Chunk(tokens=1, tool_calls=(options.tool_call.delta(f"call_{number}"),))
            yield Chunk(finish_reason="tool_calls", usage=Usage(len(prompt), 1, cached))
            return
        tokens, finish_reason = self._reply(request, number)
        slow = options.slowdown.get(request.agent, 1.0)
        clock = asyncio.get_running_loop().time
        ttft_s = options.ttft_s
        if options.stragglers and self._random.random() < options.stragglers.share:
            ttft_s *= options.stragglers.factor
        prefill_s = slow * (ttft_s + (len(prompt) - cached) * options.prefill_s_per_token)
        first_due, itl_s = clock() + prefill_s, slow * options.itl_s
        said = tokens[: fault.after_tokens] if fault else tokens
        logprob = options.logprob if request.extra.get("logprobs") else None
        size = len(said) if at_once else 1
        for start in range(0, len(said), size or 1):
            piece = said[start : start + size]
            await self._decode(len(piece), first_due + start * itl_s, itl_s)
            yield Chunk("".join(piece), len(piece), logprob=logprob * len(piece) if logprob is not None else None)
        if fault:
            await _strike(fault)
        yield Chunk(finish_reason=finish_reason, usage=Usage(len(prompt), len(tokens), cached), prefill_s=prefill_s)

    async def _decode(self, tokens: int, first_due: float, itl_s: float) -> None:
        """Wait until the last of so many tokens is due; who cuts this off has had those that were due."""
        clock = asyncio.get_running_loop().time
        done = 0
        try:
            if (left_s := first_due + (tokens - 1) * itl_s - clock()) > 0:
                await asyncio.sleep(left_s)
            done = tokens
        except asyncio.CancelledError:
            late_s = clock() - first_due
            done = 0 if late_s < 0 else min(tokens, 1 + int(late_s / itl_s)) if itl_s else tokens
            raise
        finally:
            self.decoded += done

    def _reply(self, request: EngineRequest, number: int) -> tuple[list[str], FinishReason]:
        if self.options.reply_tokens:
            tokens = [f"{n} " for n in range(1, self.options.reply_tokens + 1)]
        else:
            text = self.options.replies.get(request.agent, self.options.reply)
            fields = {"agent": request.agent, "call": str(number), "prompt": request.messages[-1]["content"]}
            tokens = _tokens(re.sub(r"\{(agent|call|prompt)\}", lambda match: fields[match[1]], text))
        tokens = tokens[len(_tokens(request.continue_from)) :]
        most = request.sampling.max_tokens
        return (tokens[:most], "length") if most and len(tokens) > most else (tokens, "stop")

    def _check_window(self, prompt_tokens: int) -> None:
        window = self.options.context_window
        if window is not None and prompt_tokens >= window:
            raise ContextOverflow(f"the prompt takes {prompt_tokens} of {window} tokens")

    def _prefill(self, prompt: list[str]) -> int:
        """Take a prompt into the prefix cache; returns how many of its first tokens were there."""
        keys = list(accumulate(prompt, lambda key, token: hash((key, token)), initial=0))[1:]
        cached = sum(1 for _ in takewhile(self._prefixes.__contains__, keys))
        for key in reversed(keys):  # the shortest prefix last: without it the longer ones are of no use
            self._prefixes[key] = None
            self._prefixes.move_to_end(key)
        while len(self._prefixes) > _REMEMBERED_PREFIXES:
            self._prefixes.popitem(last=False)
        return cached


async def _strike(fault: Fault) -> None:
    if fault.kind == "hang":
        await asyncio.Event().wait()
    raise _ERRORS[fault.kind](f"scripted fault: {fault.kind}")


def _tokens(text: str) -> list[str]:
    return re.findall(r"\S+\s*", text)


def _tokens_of(messages: tuple[Message, ...]) -> list[str]:
    return [token for message in messages for token in (f"<{message['role']}>", *message["content"].split())]
