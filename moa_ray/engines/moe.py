"""A Mixture-of-Experts model in Hugging Face's form, its experts actors of an `ExpertPool`.

The replica holds what is not an expert and decodes; the experts' shards are actors besides it, with their own CPUs
and GPUs. torch and transformers load with the first engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt

from moa_ray.engines import _hub, catalogue
from moa_ray.engines.protocol import Chunk, EngineInfo, EngineRequest, FinishReason, Sampling, Usage
from moa_ray.errors import ContextOverflow, EngineError, EngineRefused, EngineUnavailable, MoARayError, SpecError
from moa_ray.graph.messages import Message
from moa_ray.graph.spec import Resources

if TYPE_CHECKING:
    from moa_ray.moe.remote.chat import ChatModel


class MoEOptions(BaseModel):
    """Keys of an engine of `kind: moe`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    shards: PositiveInt = 1
    """Actors that the experts of each layer are spread over."""
    shard_replicas: PositiveInt = 1
    """Actors that hold the same experts; with two, one may die and nobody notices."""
    num_cpus_per_shard: PositiveFloat = 1.0
    """CPUs of each of these actors, besides those of the engine's own replica."""
    num_gpus_per_shard: NonNegativeFloat = 0.0
    """GPUs of each of these actors; a fraction shares one."""
    slots: PositiveInt = 4
    """Answers generated at once; more wait."""
    placement_timeout_s: PositiveFloat = 60.0
    """Longest time to wait for room for the shards."""


class MoEEngine:
    """An `Engine` over one checkpoint. Make it with `create`."""

    Options: ClassVar[type[BaseModel]] = MoEOptions

    def __init__(self, name: str, model: ChatModel, options: MoEOptions) -> None:
        self._name = name
        self._model: ChatModel | None = model
        self._slots = asyncio.Semaphore(options.slots)

    @classmethod
    def default_resources(cls, options: BaseModel) -> Resources:
        """One CPU for what is not an expert; the shards take theirs besides."""
        return Resources(num_cpus=1, num_gpus=0)

    @classmethod
    async def create(cls, model: str, options: BaseModel, *, num_cpus: float) -> MoEEngine:
        """Load a model; its experts go from the files to the shards, and never through this process.

        Args:
            model: A folder in Hugging Face's form that all nodes see, a catalogue name, or a Hugging Face id.
            options: A `MoEOptions`.
            num_cpus: CPUs that this process may keep busy.

        Raises:
            ModelNotFound: If there is no such model.
            EngineRefused: If torch or transformers is not installed, the model has no experts that can be moved, or the
                shards have nowhere to run.
        """
        checked = MoEOptions.model_validate(options)
        folder = await asyncio.to_thread(_folder, model)
        return cls(model, await asyncio.to_thread(_load, folder, checked, max(1, int(num_cpus))), checked)

    async def info(self) -> EngineInfo:
        """The window that the model was trained for."""
        return EngineInfo(self._name, self._opened.context_window, continues=True)

    async def count_tokens(self, messages: tuple[Message, ...]) -> int:
        """Exact, by the model's own template and vocabulary."""
        return len(await self._encode(messages))

    async def warm(self, request: EngineRequest) -> Usage:
        """Nothing: there is no prefix cache."""
        return Usage()

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """Answer `request`, a chunk a token; closing the generator stops the decoding after the running token."""
        began = time.monotonic()
        prompt = await self._encode(request.messages_to_continue)
        most = self._room(len(prompt), request.sampling)
        async with self._slots:
            pieces = _Pieces(self._opened, prompt, most, request.sampling)
            answer, counted, ttft_s = _Answer(request.sampling.stop), 0, None
            finish: FinishReason = "length"
            try:
                while finish == "length" and counted < most:
                    piece = await pieces.next()
                    counted += 1
                    ttft_s = time.monotonic() - began if ttft_s is None else ttft_s
                    if piece is None or answer.ends_with(piece):
                        finish = "stop"
                    elif text := answer.take():
                        yield Chunk(text, 1)
                    else:
                        yield Chunk(tokens=1)
            finally:
                pieces.stop()
        usage = Usage(len(prompt), counted)
        tokens = 1 if finish == "stop" else 0
        yield Chunk(answer.rest(), tokens, finish, usage, ttft_s=ttft_s)

    async def close(self) -> None:
        """End the shards."""
        model, self._model = self._model, None
        if model is not None:
            await asyncio.to_thread(model.close)

    @property
    def _opened(self) -> ChatModel:
        if self._model is None:
            raise EngineUnavailable(f"{self._name}: the engine is closed")
        return self._model

    async def _encode(self, messages: tuple[Message, ...]) -> list[int]:
        try:
            return await asyncio.to_thread(self._opened.encode, messages)
        except SpecError as error:
            raise EngineRefused(error.message, hint=error.hint) from error

    def _room(self, prompt: int, sampling: Sampling) -> int:
        """Tokens that the answer may have."""
        window = self._opened.context_window
        if window is None:
            return sampling.max_tokens or 1024
        if prompt + 1 > window:
            message = f"the prompt takes {prompt} tokens, the window holds {window}"
            raise ContextOverflow(message, hint="shorten the prompt")
        return min(sampling.max_tokens or window, window - prompt)


class _Pieces:
    """A blocking iterator of text, a thread's work for each piece, so that nothing runs while nobody waits."""

    def __init__(self, model: ChatModel, prompt: list[int], most: int, sampling: Sampling) -> None:
        from moa_ray.moe.remote.chat import Draw

        draw = Draw(
            temperature=1.0 if sampling.temperature is None else sampling.temperature,
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            seed=sampling.seed,
        )
        self._iterator = model.generate(prompt, most, draw)

    async def next(self) -> str | None:
        """The next piece; None where the model ends.

        Raises:
            EngineUnavailable: The experts are gone, and did not come back in time.
        """
        try:
            return await asyncio.to_thread(next, self._iterator)
        except MoARayError as error:
            raise EngineUnavailable(error.message, hint=error.hint) from error

    def stop(self) -> None:
        """No more pieces; a token that is being computed is thrown away."""
        self._iterator = iter(())


class _Answer:
    """Text up to the first of some stop strings; holds back what may become one.

    Args:
        stops: The strings.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def ends_with(self, piece: str) -> bool:
        """Takes in a piece; returns whether a stop string is in the text now, and cuts the text there."""
        self._held += piece
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self._held = self._held[: min(places)]
        return bool(places)

    def take(self) -> str:
        """What cannot be part of a stop string any more."""
        kept = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), kept, -1):
                if self._held.endswith(stop[:length]):
                    kept = length
                    break
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return text

    def rest(self) -> str:
        """What is left at the end."""
        text, self._held = self._held, ""
        return text


def _folder(model: str) -> Path:
    found = catalogue.folder(model)
    return Path(found) if Path(found).is_dir() else _hub.snapshot(found)


def _load(folder: Path, options: MoEOptions, threads: int) -> ChatModel:
    try:
        import torch

        from moa_ray.moe.remote.chat import ChatModel
    except ImportError as error:
        hint = "pip install 'moa-ray[moe]' transformers"
        raise EngineRefused(f"engines of kind 'moe' need {error.name}", hint=hint) from error
    torch.set_num_threads(threads)
    pool: dict[str, Any] = options.model_dump(exclude={"slots", "shard_replicas"})
    try:
        return ChatModel(folder, pool | {"replicas": options.shard_replicas})
    except EngineError:
        raise
    except MoARayError as error:
        raise EngineRefused(error.message, hint=error.hint) from error
