"""Bad input of every kind: OpenAI's error and status, no stack trace, and the server stays up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from moa_ray.errors import EngineOverloaded
from moa_ray.server import ServerSettings
from moa_ray.server.problems import headers_of
from tests.server.local import Served, serving

USER = [{"role": "user", "content": "why?"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(2, settings=ServerSettings(max_body_bytes=10_000, max_n=2)) as served:
        yield served


def _post(served: Served, content: bytes, path: str = "/v1/chat/completions", **headers: str) -> httpx2.Response:
    return httpx2.post(served.url + path, content=content, headers={"content-type": "application/json", **headers})


def _chat(**fields: Any) -> bytes:
    return json.dumps({"model": "panel", "messages": USER, **fields}).encode()


BAD: list[tuple[bytes, int, str, str | None]] = [
    (b"{not json", 400, "not JSON", None),
    (b"", 400, "", None),
    ('{"model": "caf\xe9"}'.encode("latin-1"), 400, "UTF-8", None),
    (b"\xff\xfe\x00{", 400, "not JSON", None),
    (b"[1, 2]", 400, "", None),
    (b"null", 400, "", None),
    (_chat(model="panle"), 404, "did you mean 'panel'", None),
    (_chat(model="panel/cheif"), 404, "did you mean 'chief'", None),
    (_chat(model=7), 400, "model", "model"),
    (_chat(model=""), 400, "model", "model"),
    (_chat(messages=[]), 400, "messages", "messages"),
    (_chat(messages="why?"), 400, "messages", "messages"),
    (_chat(messages=[{"role": "wizard", "content": "x"}]), 400, "messages.0.role", "messages.0.role"),
    (_chat(messages=[{"content": "x"}]), 400, "messages.0.role", "messages.0.role"),
    (_chat(messages=[{"role": "user"}]), 400, "the prompt is empty", None),
    (_chat(messages=[{"role": "user", "content": "  "}]), 400, "the prompt is empty", None),
    (_chat(messages=[*USER, {"role": "assistant", "content": "x"}]), 400, "nothing is asked", None),
    (_chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages.0.content", None),
    (_chat(temperature=-1), 400, "temperature", "temperature"),
    (_chat(temperature=1e9), 400, "temperature", "temperature"),
    (_chat(top_p=2), 400, "top_p", "top_p"),
    (_chat(max_tokens=0), 400, "max_tokens", "max_tokens"),
    (_chat(max_tokens=-5), 400, "max_tokens", "max_tokens"),
    (_chat(max_tokens=10**30), 400, "max_tokens", "max_tokens"),
    (_chat(max_completion_tokens="many"), 400, "max_completion_tokens", "max_completion_tokens"),
    (_chat(n=0), 400, "n:", "n"),
    (_chat(n=3), 400, "n: 3 is more than the 2 allowed here", None),
    (_chat(seed=10**40), 400, "seed", "seed"),
    (_chat(stop=["x"] * 99), 400, "stop", "stop"),
    (_chat(logprobs=True), 400, "logprobs: not supported", None),
    (_chat(moa={"k": -1}), 400, "moa.k", "moa.k"),
    (_chat(moa={"k": 99}), 200, "", None),
    (_chat(moa={"k": [1, 1]}), 400, "2 numbers for the 1 layers", None),
    (_chat(moa={"draft": True}), 400, "moa.draft", "moa.draft"),
    (_chat(moa={"policy": {"deadline_s": 1e9}}), 400, "policy.deadline_s", None),
    (_chat(moa={"policy": {"deadline_s": -1}}), 400, "policy.deadline_s", None),
    (_chat(moa={"policy": {"graces": 1}}), 400, "policy.graces", None),
    (_chat(messages=[{"role": "user", "content": "x" * 20_000}]), 413, "10000 bytes", None),
]


@pytest.mark.parametrize(("content", "status", "message", "param"), BAD)
def test_bad_input_is_told_in_openais_shape(
    served: Served, content: bytes, status: int, message: str, param: str | None
) -> None:
    response = _post(served, content)
    assert response.status_code == status, response.text
    if status == 200:
        return
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["type"] == "invalid_request_error" and error["message"] and "Traceback" not in response.text
    assert message in error["message"]
    assert param is None or error["param"] == param
    assert error["request_id"] == response.headers["x-request-id"]
    assert response.headers["x-should-retry"] == "false"
    assert _post(served, _chat()).status_code == 200, "the server stays up"


def test_a_body_that_does_not_say_its_length_is_bounded_too(served: Served) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    response = httpx2.post(f"{served.url}/v1/chat/completions", content=endless())
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/responses", 405)])
def test_paths_and_methods_that_are_not_there_are_told_in_openais_shape(
    served: Served, method: str, path: str, status: int
) -> None:
    response = httpx2.request(method, served.url + path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_callers_request_id_is_kept_and_a_strange_one_is_not(served: Served) -> None:
    assert _post(served, _chat(), **{"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    assert 0 <= int(_post(served, _chat()).headers["openai-processing-ms"]) < 10_000
    assert _post(served, _chat(), **{"x-request-id": "a b" * 99}).headers["x-request-id"].startswith("req-")
    assert _post(served, _chat(model="x"), **{"x-request-id": "mine-8"}).json()["error"]["request_id"] == "mine-8"


def test_an_engine_that_wants_a_pause_has_it_told_to_the_caller() -> None:
    assert headers_of(EngineOverloaded("later", retry_after_s=7.2)) == {"x-should-retry": "true", "Retry-After": "7"}


def test_a_bug_of_ours_costs_one_request_and_shows_no_internals(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise ZeroDivisionError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(served.backend, "stream", broken)
        response = _post(served, _chat())
    assert response.status_code == 500 and "secret detail" not in response.text
    assert response.json()["error"]["code"] == "internal_error"
    assert _post(served, _chat()).status_code == 200
