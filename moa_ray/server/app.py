"""The ASGI application: its paths, and how a request becomes an answer."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from math import isinf
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from moa_ray import __version__
from moa_ray.errors import MoARayError, ModelNotFound, RequestError
from moa_ray.graph import Message, conversation
from moa_ray.graph.source import which
from moa_ray.runtime import RunOptions
from moa_ray.server import playground, problems
from moa_ray.server.backend import Backend
from moa_ray.server.chat import Chat
from moa_ray.server.edge import Admission, Edge
from moa_ray.server.feedback import FeedbackRequest, answered
from moa_ray.server.live import Live, picture
from moa_ray.server.metrics import Metrics
from moa_ray.server.responses import Response as ResponseAnswer
from moa_ray.server.runs import merged
from moa_ray.server.schemas import ChatRequest, ResponsesRequest
from moa_ray.server.settings import ServerSettings
from moa_ray.server.tracing import Tracing

Answer = Chat | ResponseAnswer | Live
_PIECE_EVERY_S = 0.02
"""How often a reader is told of more text: to people this is at once."""
_MOST_PIECES_A_SECOND = 500
"""To all readers together. A piece costs two milliseconds of CPU on its way here, so a core carries about as many."""
_DONE = b"data: [DONE]\n\n"
_SILENCE = b": keep-alive\n\n"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": problems.ProblemBody} for status in (400, 401, 404, 413, 429, 500, 502, 503, 504)
}

_EVENTS = _ERRORS | {200: {"content": {"text/event-stream": {}}, "description": "Events, in docs/events.md's form."}}
_ANSWERS = _ERRORS | {200: {"content": {"text/event-stream": {}}}}


def create_app(backend: Backend, settings: ServerSettings | None = None) -> ASGIApp:
    """The application that answers for the graphs of `backend`."""
    settings = settings or ServerSettings()
    app = FastAPI(title="moa-ray", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(MoARayError, problems.on_error)
    app.add_exception_handler(RequestValidationError, problems.on_invalid_body)
    app.add_exception_handler(HTTPException, problems.on_http_error)
    app.add_exception_handler(Exception, problems.on_bug)
    _Routes(backend, settings).add_to(app)
    # Outside of FastAPI's own middleware, which would turn our errors into its own.
    edge: ASGIApp = Edge(app, settings)
    if settings.cors_origins:
        edge = CORSMiddleware(edge, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return edge


class _Routes:
    def __init__(self, backend: Backend, settings: ServerSettings) -> None:
        self._backend = backend
        self._settings = settings
        self._admission = Admission(settings)
        self._recorder = settings.recorder()
        self._metrics = Metrics(self._admission, self._recorder)
        self._tracing = Tracing.to(settings.traces) if settings.traces else None
        self._created = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        app.post("/v1/chat/completions", responses=_ANSWERS)(self.chat)
        app.post("/v1/responses", responses=_ANSWERS)(self.response)
        app.post("/v1/runs", responses=_EVENTS)(self.run)
        app.get("/v1/graphs/{name}", responses=_ERRORS)(self.graph)
        app.post("/v1/feedback", responses=_ERRORS)(self.feedback)
        app.get("/v1/models", responses=_ERRORS)(self.models)
        app.get("/v1/models/{model:path}", responses=_ERRORS)(self.model)
        app.get("/health")(self.health)
        app.get("/ready", responses={503: {"model": problems.ProblemBody}})(self.ready)
        app.get("/metrics", response_class=PlainTextResponse)(self.metrics)
        app.get("/version")(self.version)
        app.get("/", include_in_schema=False)(playground.page)
        app.get("/playground/{name}", include_in_schema=False)(playground.file)

    # ------------------------------------------------------------------ answers

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        if (body.n or 1) > self._settings.max_n:
            raise RequestError(f"n: {body.n} is more than the {self._settings.max_n} allowed here")
        drafts = self._settings.drafts if body.moa.drafts is None else body.moa.drafts
        drafts = drafts and body.moa.call is None  # one call alone has none
        return await self._answer(body, Chat(body, drafts=drafts), request, done=_DONE)

    async def response(self, body: ResponsesRequest, request: Request) -> Response:
        """Answer an input."""
        return await self._answer(body, ResponseAnswer(body), request, done=b"")

    async def run(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, and tell everything that happens."""
        if (body.n or 1) > 1:
            raise RequestError("n: one run at a time is told here")
        live = Live(judged=self._settings.feedback is not None)
        pieces = self._pieces(body.model_copy(update={"stream": True}), live, request)
        return await _EventStream.begin(pieces, _DONE, request.state.request_id)

    async def graph(self, name: str) -> Response:
        """The shape of a graph."""
        return JSONResponse(picture(await self._backend.graph(self._graph_of(name))))

    async def _answer(
        self, body: ChatRequest | ResponsesRequest, answer: Answer, request: Request, *, done: bytes
    ) -> Response:
        pieces = self._pieces(body, answer, request)
        if body.stream:
            return await _EventStream.begin(pieces, done, request.state.request_id)
        async with aclosing(pieces):
            return JSONResponse(await anext(pieces))

    async def _pieces(
        self, body: ChatRequest | ResponsesRequest, answer: Answer, request: Request
    ) -> AsyncGenerator[dict[str, Any] | None, None]:
        """What is sent: the chunks of a stream, or the whole answer as the only piece."""
        graph, status = self._graph_of(body.model), 499  # the status that nobody reads: the client is gone
        messages, options = conversation(body.conversation), body.run_options()
        traced = self._tracing and self._tracing.request(request, body.model, answer.choices)
        if self._recorder:
            for choice in answer.choices:
                choice.followers.append(self._recorder.run(messages))
        try:
            async with self._admission.place(request.state.caller):
                options = self._paced(options, answer)
                streams = [self._backend.stream(graph, messages, _nth(options, n)) for n in range(len(answer.choices))]
                async with aclosing(merged(streams, answer.choices, self._settings.silence_s)) as batches:
                    if body.stream or isinstance(answer, Live):
                        async with aclosing(answer.chunks(batches)) as chunks:
                            async for chunk in chunks:
                                yield chunk
                        status = 200
                        self._remember(body, messages, answer)
                    else:
                        async for _ in batches:
                            pass
                        status = 200
                        self._remember(body, messages, answer)
                        yield answer.whole()
        except MoARayError as error:
            status = error.http_status
            raise
        finally:
            self._metrics.add(body.model, status, answer.choices)
            for choice in answer.choices:
                choice.close()
            if traced:
                traced.end(status)

    def _remember(self, body: ChatRequest | ResponsesRequest, messages: list[Message], answer: Answer) -> None:
        if self._settings.feedback is None or body.moa.call is not None:  # of one call alone no gate learns
            return
        if kept := answered(answer.id, body.model, messages, answer.choices):
            self._backend.remember(kept)

    async def feedback(self, body: FeedbackRequest) -> Response:
        """Say how good an answer was; gates learn from it."""
        if self._settings.feedback is None:
            raise RequestError("feedback is not kept here", hint="serve with `--set feedback=FILE`")
        await self._backend.judge(body.judgement())
        return JSONResponse({"id": body.id, "object": "feedback"})

    def _paced(self, options: RunOptions, answer: Answer) -> RunOptions:
        """How often a stream is told of more text: about every 20 ms, and less often where there are many of them."""
        if isinf(options.answer_flush_s):
            return options
        every_s = max(_PIECE_EVERY_S, self._admission.running / _MOST_PIECES_A_SECOND)
        drafts_s = max(answer.drafts_every_s, every_s)
        return replace(options, draft_flush_s=drafts_s, answer_flush_s=every_s, answer_only=not answer.drafts)

    def _graph_of(self, model: str) -> str:
        name = model.partition("/")[0]
        if name not in self._backend.graphs:
            known = self._backend.graphs
            hint = which(name, known)
            raise ModelNotFound(f"there is no model {model!r}", hint=hint)
        return name

    # ------------------------------------------------------------------ models

    async def models(self) -> Response:
        """Every graph, and every agent of it by `graph/agent`."""
        cards = [card for name in self._backend.graphs for card in await self._cards(name)]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, model: str) -> Response:
        """One of them."""
        for card in await self._cards(self._graph_of(model)):
            if card["id"] == model:
                return JSONResponse(card)
        raise ModelNotFound(f"there is no model {model!r}", hint="GET /v1/models lists all")

    async def _cards(self, name: str) -> list[dict[str, Any]]:
        graph = await self._backend.graph(name)
        ids = [name, *(f"{name}/{agent}" for agent in graph.spec.agents)]
        return [{"id": id, "object": "model", "created": self._created, "owned_by": "moa-ray"} for id in ids]

    # ------------------------------------------------------------------ for operators

    async def health(self) -> Response:
        """Whether this process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether every graph can answer."""
        if unready := await self._backend.unready():
            error = MoARayError(f"not ready: {', '.join(unready)}")
            return JSONResponse(problems.describe(error, request.state.request_id), 503, {"Retry-After": "1"})
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        """Figures of this replica, for Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self) -> Response:
        """The version of moa-ray."""
        return JSONResponse({"version": __version__})


class _EventStream(StreamingResponse):
    """Server-sent events. What fails before the first piece is an HTTP error; after it, an error event."""

    def __init__(self, body: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(body, media_type="text/event-stream", headers=headers)
        self._body = body

    @classmethod
    async def begin(
        cls, pieces: AsyncGenerator[dict[str, Any] | None, None], done: bytes, request_id: str
    ) -> _EventStream:
        """Wait for the first piece.

        Raises:
            MoARayError: If there is none.
        """
        return cls(_encoded(await anext(pieces), pieces, done, request_id))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._body):
            await super().__call__(scope, receive, send)


async def _encoded(
    first: dict[str, Any] | None, pieces: AsyncGenerator[dict[str, Any] | None, None], done: bytes, request_id: str
) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        yield _sse(first)
        try:
            async for piece in pieces:
                yield _sse(piece)
        except Exception as error:  # the boundary: the status was sent, so the stream itself must tell
            yield _sse(problems.describe(error, request_id))
            return
        yield done


def _sse(piece: dict[str, Any] | None) -> bytes:
    if piece is None:
        return _SILENCE
    name = f"event: {piece['type']}\n" if "type" in piece else ""
    return f"{name}data: {json.dumps(piece, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _nth(options: RunOptions, n: int) -> RunOptions:
    """The options of choice `n`: with a seed, every choice has its own."""
    seed = options.sampling.seed
    return options if seed is None else replace(options, sampling=replace(options.sampling, seed=seed + 1000 * n))
