"""The asynchronous client. `synchronous` is the same without `async`; a test holds them together."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Unpack

import httpx2
import tenacity

from moa_ray.client import wire
from moa_ray.client.answer import Answer, Assembly, Event, answer_of
from moa_ray.client.wire import Asked, Messages


class AsyncClient:
    """A client of one server.

    Args:
        base_url: The server's, `/v1` included.
        api_key: Its key.
        model: A graph, or `graph/agent`; the server's first where not given.
        timeout_s: Longest silence of the server, in seconds; while it streams, it is never silent for long.
        retries: Times that a request is tried again that failed before anything of its answer came; pauses are
            those that the server asks for.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000/v1",
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = 600.0,
        retries: int = 2,
    ) -> None:
        self._settings = wire.Settings(base_url, api_key, timeout_s, retries)
        self._default = model
        self._http = httpx2.AsyncClient(**self._settings.http())

    async def run(self, prompt: str | Messages, **asked: Unpack[Asked]) -> Answer:
        """Answer `prompt`, or the last message of a conversation.

        Args:
            prompt: A question, or OpenAI's chat messages.
            asked: Model, drafts, `k`, policy, and OpenAI's options; see `Asked`.

        Raises:
            MoARayError: The error that the server met; `ServerUnreachable` where it cannot be reached.
        """
        body = wire.body_of(await self._model(asked.get("model")), prompt, asked, stream=False)
        response = await self._request("POST", "/chat/completions", body)
        return answer_of(response.json(), response.headers.get("x-request-id", ""))

    async def stream(self, prompt: str | Messages, **asked: Unpack[Asked]) -> AsyncGenerator[Event, None]:
        """Answer `prompt` as it comes: `Draft`s, `Delta`s, and `Finished` with the whole answer.

        Takes and raises what `run` does. Closing the generator stops every engine.
        """
        body = wire.body_of(await self._model(asked.get("model")), prompt, asked, stream=True)
        response = await self._request("POST", "/chat/completions", body, stream=True)
        assembly = Assembly(response.headers.get("x-request-id", ""))
        try:
            async for line in response.aiter_lines():
                for event in assembly.add(chunk) if (chunk := wire.chunk_of(line)) else ():
                    yield event
        except httpx2.HTTPError as error:
            raise wire.unreachable(error, self._settings) from error
        finally:
            await response.aclose()
        yield assembly.finished()

    async def models(self) -> list[str]:
        """Ids of all graphs, and of their agents by `graph/agent`. Raises as `run` does."""
        response = await self._request("GET", "/models")
        return [card["id"] for card in response.json()["data"]]

    async def feedback(self, answer: Answer | str, reward: float, *, choice: int = 0) -> None:
        """Say how good an answer was; a server that keeps feedback trains its gates with it.

        Args:
            answer: The answer, or its id.
            reward: From 0, bad, to 1, good.
            choice: Which of its choices.

        Raises:
            MoARayError: As `run` does; `RequestError` where the server does not know the answer, or keeps nothing.
        """
        await self._request("POST", "/feedback", wire.feedback_of(answer, reward, choice))

    async def _model(self, wanted: str | None) -> str:
        """The model to ask; without one, the server's first."""
        if self._default is None and not wanted:
            self._default = wire.first(await self.models())
        return wanted or self._default or ""

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, stream: bool = False
    ) -> httpx2.Response:
        retrying = tenacity.AsyncRetrying(**self._settings.retrying())
        return await retrying(self._request_once, method, path, body, stream)

    async def _request_once(self, method: str, path: str, body: dict[str, Any] | None, stream: bool) -> httpx2.Response:
        request = self._http.build_request(method, path, json=body)
        try:
            response = await self._http.send(request, stream=stream)
            if response.is_error:
                await response.aread()
        except httpx2.HTTPError as error:
            raise wire.unreachable(error, self._settings) from error
        return wire.check(response)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
