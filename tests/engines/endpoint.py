"""An OpenAI-compatible endpoint on loopback that behaves as the model id says: a real HTTP server for tests and
benchmarks. `python -m tests.engines.endpoint` serves it from a process of its own and prints its URL."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.http import answering

KEY = "sk-secret-of-the-test"
WORDS = [f"w{n} " for n in range(64)]
_ERRORS: dict[str, tuple[int, dict[str, Any], dict[str, str]]] = {
    "e401": (401, {"message": f"Incorrect API key provided: {KEY}.", "code": "invalid_api_key"}, {}),
    "e404": (404, {"message": "The model `e404` does not exist", "code": "model_not_found"}, {}),
    "e400": (400, {"message": "top_p is out of range", "code": None}, {}),
    "window": (400, {"message": "maximum context length is 8 tokens", "code": "context_length_exceeded"}, {}),
    "e429": (429, {"message": "slow down", "code": "rate_limit"}, {"Retry-After": "7"}),
    "e503": (503, {"message": "warming up"}, {"Retry-After": "3"}),
    "e500": (500, {"message": "oops"}, {}),
}


class Endpoint:
    """What the server saw: bodies and headers of the requests, and how many are being streamed."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.streaming = 0

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/v1/chat/completions", self.complete, methods=["POST"])])

    async def complete(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.requests.append((body, dict(request.headers)))
        model = body["model"]
        if model in _ERRORS:
            status, error, headers = _ERRORS[model]
            return JSONResponse({"error": error}, status, headers)
        if model == "silent":
            await asyncio.sleep(30)
        if model == "html":
            return Response("<html>not an API</html>", media_type="text/html")
        if not body.get("stream"):
            return JSONResponse(_whole(model))
        return StreamingResponse(self._stream(model, body), media_type="text/event-stream")

    async def _stream(self, model: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.streaming += 1
        try:
            yield _sse(_delta(model, {"role": "assistant", "content": ""}))
            for number, word in enumerate(WORDS):
                if model == "breaks" and number == 3:
                    raise ConnectionError("the connection breaks in mid-answer")
                if model == "errs" and number == 3:
                    yield _sse({"error": {"message": "the engine died", "code": 500}})
                    return
                if model == "number" and number == 3:
                    yield b"data: 5\n\n"
                if model == "words" and number == 3:
                    yield _sse({"choices": ["w3"]})
                if model == "cut" and number == 3:
                    return
                if model == "stalls" and number == 3:
                    await asyncio.sleep(30)
                if model == "slow":
                    await asyncio.sleep(0.02)
                yield _sse(_delta(model, {"content": word}))
            yield _sse(_delta(model, {}, "length" if model == "long" else "stop"))
            if body.get("stream_options", {}).get("include_usage") and model != "uncounted":
                yield _sse({**_delta(model, {}), "choices": [], "usage": _USAGE})
            yield b"data: [DONE]\n\n"
        finally:
            self.streaming -= 1


_USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": len(WORDS),
    "total_tokens": 11 + len(WORDS),
    "prompt_tokens_details": {"cached_tokens": 5},
}


def _delta(model: str, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}


def _whole(model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": "".join(WORDS)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": _USAGE}


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@contextmanager
def serving() -> Iterator[tuple[str, Endpoint]]:
    """The endpoint in a thread: its base URL, and what it saw."""
    endpoint = Endpoint()
    with answering(endpoint.app()) as url:
        yield f"{url}/v1", endpoint


if __name__ == "__main__":
    with serving() as (url, _):
        print(url, flush=True)
        threading.Event().wait()
