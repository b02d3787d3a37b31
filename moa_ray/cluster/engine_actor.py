"""An engine as a Ray Serve deployment, and its other end: the `Engine` that the router sees."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from math import inf, isinf
from typing import Any

from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from moa_ray.cluster.calls import Method, cause_of, in_one_line, reading
from moa_ray.engines import registry
from moa_ray.engines._coalesce import coalesce
from moa_ray.engines.protocol import Chunk, Completes, EngineInfo, EngineRequest, HasHealth, Usage
from moa_ray.errors import EngineError, EngineOverloaded, EngineUnavailable, MoARayError
from moa_ray.graph import EngineSpec, Message


class EngineReplica:
    """The deployment class: one engine, in an actor of its own. Ready when its model is loaded."""

    async def __init__(self, spec: EngineSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        self._engine = await registry.create(spec)
        self._name = serve.get_replica_context().replica_id.unique_id

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """Answer, in as few messages as the reader of `request` wants; the first tells who answers."""
        yield Chunk(replica=self._name)
        async for chunk in coalesce(self._engine.stream(request), request.flush_s, request.flush_tokens):
            yield chunk

    async def complete(self, request: EngineRequest) -> Chunk:
        """Answer in one message."""
        if isinstance(self._engine, Completes):
            return await self._engine.complete(request)
        async with aclosing(coalesce(self._engine.stream(request), inf)) as chunks:
            async for chunk in chunks:
                return chunk
        raise EngineUnavailable("the stream ended without saying why")

    async def info(self) -> EngineInfo:
        """What the engine can do."""
        return await self._engine.info()

    async def warm(self, request: EngineRequest) -> Usage:
        """Prefill a prompt."""
        return await self._engine.warm(request)

    async def count_tokens(self, messages: tuple[Message, ...]) -> int:
        """Prompt tokens that `messages` take."""
        return await self._engine.count_tokens(messages)

    async def check_health(self) -> None:
        """Serve replaces this replica where the engine, having a say in it, raises."""
        if isinstance(self._engine, HasHealth):
            await self._engine.check_health()

    async def __del__(self) -> None:  # Serve awaits it when the replica is drained
        await self._engine.close()


class HandleEngine:
    """An `Engine` that lives in another deployment.

    Args:
        name: The engine's name in the spec, for errors.
        handle: Handle of its deployment.
    """

    def __init__(self, name: str, handle: DeploymentHandle[Any]) -> None:
        self._name = name
        self._handle = handle
        self._stream = Method(handle, "stream", stream=True)
        self._complete = Method(handle, "complete")
        self._info: EngineInfo | None = None

    async def info(self) -> EngineInfo:
        """Asked once, then remembered."""
        if self._info is None:
            self._info = await self._ask("info")
        return self._info

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """Chunks from one replica; closing the generator cancels the call there."""
        whole = (
            isinf(request.flush_s) and request.flush_tokens is None
        )  # a plain call costs less than half of a streamed one
        response: Any = self._complete(request) if whole else self._stream(request)
        with reading(response, self._translated):
            if whole:
                yield await response
            else:
                async for chunk in response:
                    yield chunk

    async def warm(self, request: EngineRequest) -> Usage:
        """Prefill on one replica."""
        usage: Usage = await self._ask("warm", request)
        return usage

    async def count_tokens(self, messages: tuple[Message, ...]) -> int:
        """Prompt tokens that `messages` take."""
        count: int = await self._ask("count_tokens", messages)
        return count

    async def close(self) -> None:
        """The deployment outlives its handles."""

    async def _ask(self, method: str, *args: Any) -> Any:
        response = getattr(self._handle, method).remote(*args)
        with reading(response, self._translated):
            return await response

    def _translated(self, error: BaseException) -> EngineError:
        """Ray's view of a failed call, as ours."""
        cause = cause_of(error)
        if isinstance(cause, EngineError):
            cause.engine = self._name
            return cause
        if isinstance(cause, MoARayError):
            return EngineUnavailable(cause.message, engine=self._name, hint=cause.hint)
        if isinstance(cause, BackPressureError):
            return EngineOverloaded(f"every replica of {self._name} is full", engine=self._name)
        return EngineUnavailable(in_one_line(cause), engine=self._name)
