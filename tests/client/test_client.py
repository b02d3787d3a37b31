"""Every behaviour is shown by both clients; the synchronous one runs in a thread of its own, as its callers do."""

from __future__ import annotations

import asyncio
import inspect
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest
import tenacity
from pydantic import SecretStr

from moa_ray import errors
from moa_ray.client import Answer, AsyncClient, Client, Delta, Draft, Event, Finished, asynchronous, synchronous, wire
from moa_ray.errors import (
    EngineRefused,
    MoARayError,
    ModelNotFound,
    QuorumNotMet,
    RequestError,
    ServerUnreachable,
    Unauthorized,
)
from moa_ray.server import ServerSettings
from tests.server.local import Served, serving


class Asynchronous:
    """One interface for both clients."""

    def __init__(self, url: str, **given: Any) -> None:
        self.client = AsyncClient(url, **given)

    async def run(self, *args: Any, **given: Any) -> Answer:
        return await self.client.run(*args, **given)

    async def stream(self, *args: Any, **given: Any) -> AsyncGenerator[Event, None]:
        async with aclosing(self.client.stream(*args, **given)) as events:
            async for event in events:
                yield event

    async def models(self) -> list[str]:
        return await self.client.models()


class Synchronous:
    def __init__(self, url: str, **given: Any) -> None:
        self.client = Client(url, **given)

    async def run(self, *args: Any, **given: Any) -> Answer:
        return await asyncio.to_thread(self.client.run, *args, **given)

    async def stream(self, *args: Any, **given: Any) -> AsyncGenerator[Event, None]:
        events = self.client.stream(*args, **given)
        try:
            while event := await asyncio.to_thread(next, events, None):
                yield event
        finally:
            await asyncio.to_thread(events.close)

    async def models(self) -> list[str]:
        return await asyncio.to_thread(self.client.models)


Either = Asynchronous | Synchronous
BOTH = pytest.mark.parametrize("client", [Asynchronous, Synchronous])


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(2, reply="{agent} says {prompt}", replies={"chief": "one two three four"}) as served:
        yield served


@BOTH
async def test_an_answer_has_text_usage_and_agents(served: Served, client: type[Either]) -> None:
    answer = await client(f"{served.url}/v1").run("why?")
    assert (answer.text, answer.model, answer.finish_reason) == ("one two three four", "panel", "stop")
    assert answer.request_id and answer.id.startswith("chatcmpl-") and answer.drafts == ""
    assert [(call.agent, call.state, call.attempts) for call in answer.agents] == [
        (name, "finished", 1) for name in ("a1", "a2", "chief")
    ]
    assert answer.usage.completion_tokens == sum(call.completion_tokens for call in answer.agents) == 10
    assert answer.usage.reasoning_tokens == 6 and answer.total_s is not None


@BOTH
async def test_a_stream_tells_drafts_then_the_answer_and_ends_with_the_whole(
    served: Served, client: type[Either]
) -> None:
    events = [event async for event in client(f"{served.url}/v1").stream("why?", drafts=True)]
    drafts = [event.text for event in events if isinstance(event, Draft)]
    assert len(drafts) == 2 and all("says why?" in draft for draft in drafts)
    assert "".join(event.text for event in events if isinstance(event, Delta)) == "one two three four"
    end = events[-1]
    assert isinstance(end, Finished) and end.answer.text == "one two three four"
    assert end.answer.drafts == "".join(drafts) and len(end.answer.agents) == 3
    assert end.answer.usage.completion_tokens == 10


@BOTH
async def test_conversation_options_and_wishes_reach_the_server(served: Served, client: type[Either]) -> None:
    served.engine.calls.clear()
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    answer = await client(f"{served.url}/v1", model="panel").run(turns, k=1, max_tokens=2, temperature=0.5)
    assert (answer.text, answer.finish_reason) == ("one two ", "length")
    assert [call.agent for call in served.engine.calls] == ["a1", "chief"]
    assert served.engine.calls[0].messages[0]["content"] == "be brief"
    assert served.engine.calls[1].sampling.temperature == 0.5
    alone = await client(f"{served.url}/v1").run("why?", model="panel/a2")
    assert alone.text == "a2 says why?"


@BOTH
async def test_one_call_of_the_graph_is_made_alone_with_the_proposals_that_it_sees(
    served: Served, client: type[Either]
) -> None:
    served.engine.calls.clear()
    caller = client(f"{served.url}/v1")
    proposal = await caller.run("why?", call="1/a2")
    assert (proposal.text, [call.call for call in proposal.agents]) == ("a2 says why?", ["1/a2"])
    answer = await caller.run("why?", call="answer", proposals={"1/a1": "Because.", "1/a2": proposal.text}, drafts=True)
    assert (answer.text, answer.drafts) == ("one two three four", "")
    assert [call.agent for call in served.engine.calls] == ["a2", "chief"]
    with pytest.raises(RequestError, match="does not see 1/a9"):
        await caller.run("why?", call="answer", proposals={"1/a9": "Because."})


@BOTH
async def test_an_answer_has_dollars_where_engines_have_a_price(served: Served, client: type[Either]) -> None:
    assert (await client(f"{served.url}/v1").run("why?")).dollars is None
    with serving(2, price={"prompt": 0, "completion": 10}, reply_tokens=5) as priced:
        answer = await client(f"{priced.url}/v1").run("why?")
    assert answer.dollars == pytest.approx(15 * 10 / 1e6)
    assert [call.dollars for call in answer.agents] == pytest.approx([5 * 10 / 1e6] * 3)


@BOTH
async def test_models_are_listed_and_the_first_is_asked(served: Served, client: type[Either]) -> None:
    assert await client(f"{served.url}/v1").models() == ["panel", "panel/a1", "panel/a2", "panel/chief"]


@BOTH
async def test_errors_of_the_server_arrive_as_themselves(served: Served, client: type[Either]) -> None:
    caller = client(f"{served.url}/v1", retries=0)
    with pytest.raises(ModelNotFound, match=r"did you mean 'panel'.* \[request "):
        await caller.run("why?", model="panle")
    with pytest.raises(RequestError, match="the prompt is empty"):
        await caller.run(" ")
    with pytest.raises(RequestError, match=r"policy\.retries: 9 is more than"):
        await caller.run("why?", policy={"retries": 9})
    with pytest.raises(RequestError, match="unknown option: temprature"):
        await caller.run("why?", temprature=1)
    with serving(1, settings=ServerSettings(api_keys=(SecretStr("sk-1"),))) as guarded:
        with pytest.raises(Unauthorized):
            await client(f"{guarded.url}/v1", api_key="sk-2").run("why?")
        assert (await client(f"{guarded.url}/v1", api_key="sk-1").run("why?")).text


@BOTH
async def test_a_refused_request_is_not_tried_again_and_a_failed_one_is(client: type[Either]) -> None:
    with serving(1, spec={"policy": {"retries": 0}}, faults=[{"agent": "a1", "times": 1}]) as served:
        assert (await client(f"{served.url}/v1", retries=1).run("why?")).text
        assert [call.agent for call in served.engine.calls] == ["a1", "a1", "chief"]
    with serving(1, spec={"policy": {"retries": 0}}, faults=[{}]) as served:
        with pytest.raises(QuorumNotMet):
            await client(f"{served.url}/v1", retries=1).run("why?")
        assert len(served.engine.calls) == 2
    with serving(1, faults=[{"agent": "chief", "kind": "refused"}]) as served:
        with pytest.raises(EngineRefused):
            await client(f"{served.url}/v1", retries=5).run("why?")
        assert len([call for call in served.engine.calls if call.agent == "chief"]) == 1


@BOTH
async def test_a_failure_in_mid_stream_is_raised_after_what_came_and_not_tried_again(client: type[Either]) -> None:
    faults = [{"agent": "chief", "after_tokens": 2, "kind": "unavailable"}]
    with serving(1, replies={"chief": "one two three"}, itl_s=0.05, faults=faults, continues=False) as served:
        text = ""
        with pytest.raises(MoARayError, match="scripted fault"):
            async for event in client(f"{served.url}/v1", retries=3).stream("why?"):
                text += event.text if isinstance(event, Delta) else ""
        assert text == "one two "
        assert len([call for call in served.engine.calls if call.agent == "chief"]) == 1


@BOTH
async def test_leaving_a_stream_stops_the_engines(client: type[Either]) -> None:
    with serving(1, itl_s=0.01, reply_tokens=100_000) as served:
        async with aclosing(client(f"{served.url}/v1").stream("why?", model="panel/chief")) as events:
            assert isinstance(await anext(events), Delta)
        await asyncio.to_thread(served.until_idle)


@BOTH
async def test_nobody_there_is_told_in_one_line(client: type[Either]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ServerUnreachable, match=f"nobody answers at http://127.0.0.1:{port}/v1"):
        await client(f"http://127.0.0.1:{port}/v1", retries=0).run("why?", model="m")


# ---------------------------------------------------------------- a server of bad manners

Handler = Callable[[BaseHTTPRequestHandler], None]


class _Rude:
    """A server whose answers are played by handlers, one a request; the last goes on."""

    def __init__(self, *handlers: Handler) -> None:
        self.requests = 0
        outer = self

        class Playing(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                outer.requests += 1
                handlers[min(outer.requests, len(handlers)) - 1](self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Playing)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> _Rude:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _answer(status: int, body: str, **headers: str) -> Handler:
    def play(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body.encode())

    return play


WHOLE = '{"id": "c", "model": "m", "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}'


@BOTH
@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_a_server_that_asks_for_another_try_gets_one(client: type[Either], status: int) -> None:
    with _Rude(_answer(status, "busy", Retry_After="0"), _answer(200, WHOLE)) as rude:
        answer = await client(rude.url, model="m").run("why?")
        assert (answer.text, answer.agents, rude.requests) == ("hi", (), 2)


@pytest.mark.parametrize(("wished", "pause_s"), [("7", (7, 7)), ("9999", (60, 60)), (None, (1.0, 2.0))])
def test_the_pause_is_what_the_server_asks_for_within_reason_else_it_grows(
    wished: str | None, pause_s: tuple[float, float]
) -> None:
    headers = {"retry-after": wished} if wished else {}
    request = httpx2.Request("POST", "http://server/v1")
    with pytest.raises(ServerUnreachable) as caught:
        wire.check(httpx2.Response(503, headers=headers, text="busy", request=request))
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    state.attempt_number = 3
    state.set_exception((ServerUnreachable, caught.value, None))
    least, most = pause_s
    assert least <= wire.Settings("", None, 1.0, 5).retrying()["wait"](state) <= most


@BOTH
async def test_a_server_that_says_that_trying_again_is_useless_is_believed(client: type[Either]) -> None:
    with _Rude(_answer(503, "no", x_should_retry="false")) as rude:
        with pytest.raises(ServerUnreachable, match="answered 503: no"):
            await client(rude.url, model="m", retries=4).run("why?")
        assert rude.requests == 1


@BOTH
async def test_a_stream_that_ends_before_its_answer_is_an_error(client: type[Either]) -> None:
    chunk = '{"id": "c", "model": "m", "choices": [{"delta": {"content": "hi"}, "finish_reason": null}]}'
    with _Rude(_answer(200, f"data: {chunk}\n\n")) as rude:
        texts = []
        with pytest.raises(ServerUnreachable, match="ended before the answer did"):
            async for event in client(rude.url, model="m").stream("why?"):
                texts.append(event)
        assert texts == [Delta("hi")]


@BOTH
async def test_silence_is_bounded_and_not_tried_again(client: type[Either]) -> None:
    release = threading.Event()
    with _Rude(lambda _: (release.wait(20), None)[1]) as rude:
        with pytest.raises(ServerUnreachable, match=r"was silent for 0\.2 s"):
            await client(rude.url, model="m", timeout_s=0.2, retries=3).run("why?")
        assert rude.requests == 1
        release.set()


# ---------------------------------------------------------------- sync == async

_SAME = {
    r"async (?=def|for|with)|await ": "",
    "AsyncClient": "Client",
    "AsyncGenerator": "Generator",
    "AsyncRetrying": "Retrying",
    "aiter_lines": "iter_lines",
    "aread": "read",
    "aclose": "close",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    r"Generator\[Event, None\]": "Generator[Event, None, None]",
    r"for event in (.*):\s+yield event": r"yield from \1",  # what only a generator without async can
}


def _text(module: Any) -> str:
    """The code of a module without `async`, without its docstring and its line breaks."""
    text = inspect.getsource(module).split('"""', 2)[2]
    for there, here in _SAME.items():
        text = re.sub(there, here, text)
    return re.sub(r"[\s,]+", "", text)


def test_the_synchronous_client_is_the_asynchronous_one_without_async() -> None:
    assert _text(asynchronous) == _text(synchronous)


def test_both_clients_are_context_managers(served: Served) -> None:
    with Client(f"{served.url}/v1") as client:
        assert client.models()

    async def use() -> list[str]:
        async with AsyncClient(f"{served.url}/v1") as client:
            return await client.models()

    assert asyncio.run(use())


def test_the_client_needs_neither_ray_nor_torch_nor_pydantic() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'torch', 'pydantic', 'yaml', 'fastapi', 'openai'): sys.modules[name] = None\n"
        "import moa_ray.client\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_error_that_a_server_can_meet_has_a_code_of_its_own() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MoARayError)]
    codes = [cls.openai_code for cls in classes]
    assert len(set(codes)) == len(codes)
