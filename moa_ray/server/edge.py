"""What every request passes before it is read: an id, an API key, a bound on its size, a place."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

from starlette._utils import get_route_path
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
        headers, arrived = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req-{uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                added["x-request-id"] = request_id
                added["openai-processing-ms"] = str(round((time.perf_counter() - arrived) * 1e3))
            await send(message)

        try:
            # Not `scope["path"]`: below a route prefix that begins with the prefix.
            if get_route_path(scope).startswith(_GUARDED) and scope["method"] != "OPTIONS":
                scope["state"]["caller"] = _caller(headers, self._keys)
            receive = await _with_body(headers, receive, self._max_body_bytes)
            await self._app(scope, receive, send_with_id)
        except MoARayError as error:
            await respond(error, request_id)(scope, receive, send_with_id)


def _caller(headers: Headers, keys: Sequence[bytes]) -> str:
    """Who asks: which of the keys, by its number; "" where none is needed.

    Raises:
        Unauthorized: If a key is needed, and this is none.
    """
    if not keys:
        return ""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
    # Every key is compared, each in constant time: how long this takes tells nothing.
    fits = [secrets.compare_digest(given, key) for key in keys]
    if not any(fits):
        hint = "send one as `Authorization: Bearer KEY`"
        raise Unauthorized("the API key is wrong" if given else "an API key is needed", hint=hint)
    return str(fits.index(True))


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
    """So many requests at once, so many more waiting, and no more.

    Callers are told apart by their API keys. They take turns in the queue, and each waits in its own order; where the
    queue is full, a newcomer takes the place of whoever came last of the caller with the most in it, if that is more
    than the newcomer's own.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self.running = 0

    @property
    def queued(self) -> int:
        """Requests that wait for a place."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def place(self, caller: str = "") -> AsyncGenerator[None, None]:
        """A place, for as long as the context is open.

        Raises:
            Overloaded: If too many wait already, or the wait was too long.
        """
        if self.running < self._settings.max_running:  # then nobody waits
            self.running += 1
        else:
            await self._queue(caller)
        try:
            yield
        finally:
            self._leave()

    async def _queue(self, caller: str) -> None:
        """Wait until somebody leaves a place to this request."""
        if self.queued >= self._settings.max_queued:
            self._make_room_for(caller)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        timeout_s = self._settings.queue_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            if turn in self._waiting.get(caller, ()):
                self._remove(caller, turn)
            elif not turn.cancelled() and turn.exception() is None:  # the place came in the same moment
                self._leave()
            if isinstance(error, TimeoutError):
                raise Overloaded(f"no place within {timeout_s:g} s", retry_after_s=5.0) from None
            raise

    def _make_room_for(self, caller: str) -> None:
        """Refuse whoever has the least right to wait: the newcomer, or the last of a caller with more in the queue."""
        error = Overloaded(
            f"{self.running} requests are being answered and {self.queued} wait", hint="come back in a moment"
        )
        greediest = max(self._waiting, key=lambda name: len(self._waiting[name]), default=caller)
        own = len(self._waiting.get(caller, ()))
        if len(self._waiting.get(greediest, ())) <= own + 1:
            raise error
        last = self._waiting[greediest][-1]
        self._remove(greediest, last)
        last.set_exception(error)

    def _leave(self) -> None:
        """Give the place to the caller whose turn it is, or back."""
        while self._waiting:
            caller, turns = next(iter(self._waiting.items()))
            turn = turns[0]
            self._remove(caller, turn)
            if caller in self._waiting:
                self._waiting.move_to_end(caller)
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1

    def _remove(self, caller: str, turn: asyncio.Future[None]) -> None:
        self._waiting[caller].remove(turn)
        if not self._waiting[caller]:
            del self._waiting[caller]
