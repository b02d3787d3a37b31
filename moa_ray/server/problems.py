"""Errors in OpenAI's shape: `{"error": {message, type, param, code}}`, and what tells a client whether to try again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from moa_ray.errors import MoARayError

_LOG = logging.getLogger("moa_ray.server")
_RETRY_AFTER_S = 1.0


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    request_id: str | None = None


class ProblemBody(BaseModel):
    """Body of every answer that is an error."""

    error: Problem


def describe(error: Exception, request_id: str) -> dict[str, Any]:
    """The body that tells of `error`; of an error that is not ours, only that there was one."""
    if isinstance(error, MoARayError):
        message = f"{error.message} ({error.hint})" if error.hint else error.message
        return _body(message, error.openai_type, error.openai_code, request_id)
    _LOG.error("request %s failed", request_id, exc_info=error)
    return _body(
        "internal error; the server's log has the details under this request id",
        "server_error",
        "internal_error",
        request_id,
    )


def _body(message: str, type: str, code: str, request_id: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code, "request_id": request_id}}


def headers_of(error: MoARayError) -> dict[str, str]:
    """Whether and when a client should try again."""
    if not error.retryable:
        return {"x-should-retry": "false"}
    headers = {"x-should-retry": "true"}
    if error.http_status in (429, 503):
        wished = error.retry_after_s if error.http_status == 429 else None
        headers["Retry-After"] = f"{max(wished or _RETRY_AFTER_S, 1):.0f}"
    return headers


def respond(error: MoARayError, request_id: str) -> JSONResponse:
    """`error` as an HTTP response."""
    return JSONResponse(describe(error, request_id), error.http_status, headers_of(error))


async def on_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of `MoARayError`."""
    assert isinstance(error, MoARayError)
    return respond(error, request.state.request_id)


async def on_bug(request: Request, error: Exception) -> JSONResponse:
    """Handler of what nobody foresaw."""
    return JSONResponse(describe(error, request.state.request_id), 500)


async def on_invalid_body(request: Request, error: Exception) -> JSONResponse:
    """Handler of bodies that do not fit their schema; names the first field that is wrong."""
    assert isinstance(error, RequestValidationError)
    first: Mapping[str, Any] = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"][1:] if not _is_branch(part))
    if first["type"] == "json_invalid":
        message, param = f"the body is not JSON: {first['ctx']['error']}", None
    else:
        message, param = (f"{path}: {first['msg']}" if path else first["msg"]), path or None
    body = _body(message, "invalid_request_error", "invalid_request", request.state.request_id, param)
    return JSONResponse(body, 400, {"x-should-retry": "false"})


def _is_branch(part: object) -> bool:
    """Whether a part of a path names a member of a union, in place of a key of the user's."""
    return isinstance(part, str) and (part in ("str", "int") or not part.isidentifier())


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of what the framework refuses: unknown paths, methods, unreadable bodies."""
    assert isinstance(error, HTTPException)
    message = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not allowed here"}
    text = message.get(error.status_code, "the body cannot be read; send JSON in UTF-8")
    body = _body(text, "invalid_request_error", "invalid_request", request.state.request_id)
    return JSONResponse(body, error.status_code, {**(error.headers or {}), "x-should-retry": "false"})
