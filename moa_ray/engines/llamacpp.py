"""A GGUF model in this process: llama.cpp's server by way of `xllamacpp`, spoken to over a private Unix socket.

The socket lies in a folder that only this user may enter, so no port is open to anybody. The server could
also be called directly, but that takes a blocked thread per stream, and callbacks that need the GIL while
the engine closes; over the socket a stream is plain asyncio, and closing its connection cuts the call off.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import httpx2
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from moa_ray.engines import catalogue
from moa_ray.engines._openai_stream import fields_of, logprob_of, usage_of
from moa_ray.engines.protocol import Chunk, EngineInfo, EngineRequest, FinishReason, Usage
from moa_ray.errors import ContextOverflow, EngineError, EngineRefused, EngineUnavailable, ModelNotFound
from moa_ray.graph.messages import Message
from moa_ray.graph.spec import Resources

_BATCH_TOKENS = 256
"""Prompt tokens that go through the model at once: how long a cut or another slot's next token may have to wait."""
_LEAST_SHARED = 0.02
"""The share of a prompt that a slot must hold to be given it; else it begins anew in the slot unused for longest.

The second turn of a conversation has little but the first question in common with the long prompt before it.
"""
_PARKED_PROMPTS_MIB = 512
"""Host memory for the prefixes of prompts that have lost their slot to others."""
_LONGEST_SOCKET_PATH = 100  # the kernel's limit is 108 bytes on Linux, 104 on macOS
_SILENT, _VERBOSE = -1, 4


class LlamaCppOptions(BaseModel):
    """Keys of an engine of `kind: llamacpp`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    context_window: int = Field(default=8192, ge=256)
    """Prompt plus completion tokens of each call; at most what the model was trained for."""
    slots: PositiveInt = 4
    """Calls decoded together (continuous batching); more wait. Each slot holds memory for a whole window."""
    threads: PositiveInt | None = None
    """Threads that compute; `num_cpus` of the engine's resources, rounded up, where not given."""
    gpu_layers: NonNegativeInt | None = None
    """Layers on the GPU, where xllamacpp was built for one; as many as fit where not given."""


class LlamaCpp:
    """An `Engine` over one GGUF file. Make it with `create`."""

    Options: ClassVar[type[BaseModel]] = LlamaCppOptions

    def __init__(self, model: str, server: Any, socket: Path, options: LlamaCppOptions) -> None:
        self.model = model
        self._server = server
        # A connection a call: closing it is how a call is cut off. Local, hence never worth keeping.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        transport = httpx2.AsyncHTTPTransport(uds=str(socket), limits=limits, verify=False)
        self._http = httpx2.AsyncClient(transport=transport, base_url="http://llamacpp", timeout=None)
        # llama.cpp would queue too many calls itself, but notices only at their turn that one was given up.
        self._slots = asyncio.Semaphore(options.slots)
        self._warm_ups: set[asyncio.Task[Usage]] = set()
        self._context_window: int | None = None
        self._remove_socket = weakref.finalize(self, shutil.rmtree, socket.parent, ignore_errors=True)

    @classmethod
    def default_resources(cls, options: BaseModel) -> Resources:
        """One CPU."""
        return Resources(num_cpus=1, num_gpus=0)

    @classmethod
    async def create(cls, model: str, options: BaseModel, *, num_cpus: float) -> LlamaCpp:
        """Load a model.

        Args:
            model: A path, a catalogue name or a Hugging Face id; see `catalogue.resolve`.
            options: A `LlamaCppOptions`.
            num_cpus: CPUs that this engine may keep busy.

        Raises:
            ModelNotFound: If there is no such model, or the file is not a GGUF file.
            EngineError: If llama.cpp cannot load it, or xllamacpp is not installed.
        """
        checked = LlamaCppOptions.model_validate(options)
        return await asyncio.to_thread(_load, model, checked, max(1, ceil(num_cpus)))

    async def info(self) -> EngineInfo:
        """The window of a slot, as the model grants it."""
        if self._context_window is None:
            slots = await self._call("GET", "/slots")
            self._context_window = int(slots[0]["n_ctx"])
        return EngineInfo(self.model, self._context_window, prefix_cache=True, continues=True)

    async def count_tokens(self, messages: tuple[Message, ...]) -> int:
        """Exact, by the model's own template and vocabulary."""
        counted = await self._call("POST", "/v1/chat/completions/input_tokens", {"messages": messages})
        return int(counted["input_tokens"])

    async def warm(self, request: EngineRequest) -> Usage:
        """Prefill the prompt in a slot that no call wants; the one token that llama.cpp insists on is thrown away."""
        if self._slots.locked():
            return Usage()
        task = asyncio.create_task(self._prefill(request))
        self._warm_ups.add(task)
        task.add_done_callback(self._warm_ups.discard)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        return Usage() if task.cancelled() else task.result()  # cancelled: a call took the slot

    async def _prefill(self, request: EngineRequest) -> Usage:
        usage = Usage()
        async with aclosing(self.stream(replace(request, sampling=replace(request.sampling, max_tokens=1)))) as chunks:
            async for chunk in chunks:
                usage = chunk.usage or usage
        return replace(usage, completion_tokens=0)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """Answer `request`, a chunk per piece of text; a trailing assistant message is continued."""
        usage, counted, prefill_s = Usage(), 0, None
        finish_reason: FinishReason | None = None
        if self._slots.locked() and self._warm_ups:
            self._warm_ups.pop().cancel()
        async with self._slots, aclosing(self._events(_payload(request))) as events:
            async for event in events:
                usage = usage_of(event["usage"]) if event.get("usage") else usage
                if timings := event.get("timings"):
                    prefill_s = timings["prompt_ms"] / 1e3
                for choice in event["choices"]:
                    finish_reason = choice["finish_reason"] or finish_reason
                    text, tool_calls = choice["delta"].get("content") or "", choice["delta"].get("tool_calls") or ()
                    if text or tool_calls:
                        decoded = event["timings"]["predicted_n"]
                        new = decoded - counted
                        yield Chunk(text, new, tool_calls=tuple(tool_calls), logprob=logprob_of(choice))
                        counted = decoded
        if finish_reason is None:
            raise EngineUnavailable(f"{self.model}: the answer broke off")
        rest = usage.completion_tokens - counted
        yield Chunk(tokens=rest, finish_reason=finish_reason, usage=usage, prefill_s=prefill_s)

    async def close(self) -> None:
        """Cut off what is running and free the model."""
        if self._server is not None:
            # The connections first: llama.cpp would wait for the reader of every open stream.
            await self._http.aclose()
            self._server = None
            self._remove_socket()

    async def _call(self, method: str, path: str, body: object = None) -> Any:
        self._check_open()
        try:
            response = await self._http.request(method, path, json=body)
        except httpx2.HTTPError as error:
            raise self._broken(error) from error
        if response.is_error:
            raise _failure(response.status_code, response.json()["error"])
        return response.json()

    async def _events(self, payload: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Server-sent events of a chat completion; closing this generator closes the connection."""
        self._check_open()
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=payload) as response:
                if response.is_error:
                    raise _failure(response.status_code, json.loads(await response.aread())["error"])
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):  # blank, a keep-alive comment, or [DONE]
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise _failure(event["error"].get("code", 500), event["error"])
                    yield event
        except httpx2.HTTPError as error:
            raise self._broken(error) from error

    def _check_open(self) -> None:
        if self._server is None:
            raise EngineUnavailable(f"{self.model}: the engine is closed")

    def _broken(self, error: httpx2.HTTPError) -> EngineUnavailable:
        return EngineUnavailable(f"{self.model}: the connection to llama.cpp broke ({type(error).__name__})")


def _load(model: str, options: LlamaCppOptions, cpus: int) -> LlamaCpp:
    try:
        import xllamacpp
    except ImportError as error:
        hint = "pip install 'moa-ray[local]'"
        raise EngineRefused("engines of kind 'llamacpp' need the package xllamacpp", hint=hint) from error
    path = catalogue.resolve(model)
    _check_gguf(path)
    socket = Path(tempfile.mkdtemp(prefix="moa-ray-"), "llama.sock")  # a folder of mode 0700
    if len(os.fsencode(socket)) > _LONGEST_SOCKET_PATH:
        socket.parent.rmdir()
        raise EngineRefused(f"the path {socket} is too long for a socket", hint="set TMPDIR to a shorter path")
    try:
        # xllamacpp holds the GIL in here, so this process does nothing else until the model is loaded.
        server = xllamacpp.Server(_params(xllamacpp, path, socket, options, options.threads or cpus))
    except RuntimeError as error:
        shutil.rmtree(socket.parent)
        hint = "MOA_RAY_LOG=debug shows what llama.cpp says; memory grows with context_window x slots"
        raise EngineRefused(f"llama.cpp cannot load {path}", hint=hint) from error
    return LlamaCpp(model, server, socket, options)


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        what = "is empty" if not magic else "is not a GGUF file"
        raise ModelNotFound(f"{path} {what}", hint="llama.cpp reads models in the GGUF format only")


def _params(xllamacpp: Any, path: Path, socket: Path, options: LlamaCppOptions, threads: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.hostnames = [str(socket)]  # a name that ends in .sock makes it a Unix socket
    params.ui = False
    params.endpoint_metrics = True
    params.verbosity = _VERBOSE if os.environ.get("MOA_RAY_LOG") == "debug" else _SILENT
    # llama.cpp divides n_ctx among its slots, so this gives each of them the whole window for sure.
    params.n_ctx = options.context_window * options.slots
    params.n_parallel = options.slots
    params.kv_unified = False
    params.n_batch = params.n_ubatch = _BATCH_TOKENS
    params.cache_ram_mib = _PARKED_PROMPTS_MIB
    params.slot_prompt_similarity = _LEAST_SHARED  # what else the slot held is parked, not lost
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if options.gpu_layers is not None:
        params.n_gpu_layers = options.gpu_layers
    return params


def _payload(request: EngineRequest) -> dict[str, Any]:
    return {
        "messages": request.messages_to_continue,
        "stream": True,
        "stream_options": {"include_usage": True},
        "timings_per_token": True,  # tells how many tokens a piece of text stands for
        # Without events in the prefill, llama.cpp would notice a closed connection only after it.
        "return_progress": True,
        **fields_of(request.sampling),
        **request.extra,
    }


def _failure(status: int, error: dict[str, Any]) -> EngineError:
    if error.get("type") == "exceed_context_size_error":
        return ContextOverflow(
            f"the prompt takes {error['n_prompt_tokens']} tokens, the window holds {error['n_ctx']}",
            hint="raise context_window, or shorten the prompt",
        )
    kind = EngineRefused if 400 <= status < 500 else EngineUnavailable
    return kind(f"llama.cpp: {error.get('message', status)}")
