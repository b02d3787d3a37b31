"""What every request passes before it is read: an id, an API key, a bound on its size, a place."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moa_ray.errors import BodyTooLarge, MoARayError, Overloaded, Unauthorized
from moa_ray.server.problems import respond
from moa_ray.server.settings import ServerSettings

_ID = re.compile(r"[\x21-\x7e]{1,128}")
_GUARDED = "/v1/"


class Edge:
    """ASGI middleware around the whole application.

    Args:
        app: The application.
        settings: Keys and bounds.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys]
        self._max_body_bytes = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req-{uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if scope["path"].startswith(_GUARDED) and scope["method"] != "OPTIONS":
                _check_key(headers, self._keys)
            receive = await _with_body(headers, receive, self._max_body_bytes)
            await self._app(scope, receive, send_with_id)
        except MoARayError as error:
            await respond(error, request_id)(scope, receive, send_with_id)


def _check_key(headers: Headers, keys: Sequence[bytes]) -> None:
    if not keys:
        return
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
    # Every key is compared, each in constant time: how long this takes tells nothing.
    if not any([secrets.compare_digest(given, key) for key in keys]):
        hint = "send one as `Authorization: Bearer KEY`"
        raise Unauthorized("the API key is wrong" if given else "an API key is needed", hint=hint)


async def _with_body(headers: Headers, receive: Receive, most: int) -> Receive:
    """A `receive` that gives the whole body at once, read here within its bound."""
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most)
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return _replay(message, receive)
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most:
            raise _too_large(most)
    return _replay({"type": "http.request", "body": bytes(body), "more_body": False}, receive)


def _replay(first: Message, receive: Receive) -> Receive:
    waiting = [first]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than the {most} bytes that this server takes")


class Admission:
    """So many requests at once, so many more waiting in order, and no more."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._places = asyncio.Semaphore(settings.max_running)
        self.running = 0
        self.queued = 0

    @asynccontextmanager
    async def place(self) -> AsyncGenerator[None, None]:
        """A place, for as long as the context is open.

        Raises:
            Overloaded: If too many wait already, or the wait was too long.
        """
        await self._enter()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()

    async def _enter(self) -> None:
        settings = self._settings
        if self._places.locked() and self.queued >= settings.max_queued:
            raise Overloaded(
                f"{self.running} requests are being answered and {self.queued} wait", hint="come back in a moment"
            )
        self.queued += 1
        try:
            async with asyncio.timeout(settings.queue_timeout_s):
                await self._places.acquire()
        except TimeoutError:
            raise Overloaded(f"no place within {settings.queue_timeout_s:g} s", retry_after_s=5.0) from None
        finally:
            self.queued -= 1
