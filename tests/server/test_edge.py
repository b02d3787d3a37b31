from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from moa_ray.errors import Overloaded
from moa_ray.server import ServerSettings
from moa_ray.server.edge import Admission
from tests.server.local import serving

BODY: dict[str, Any] = {"model": "panel", "messages": [{"role": "user", "content": "why?"}]}
KEYED = ServerSettings(api_keys=(SecretStr("sk-one"), SecretStr("sk-two")))


def test_any_of_the_keys_opens_and_nothing_else_does() -> None:
    with serving(1, settings=KEYED) as served:
        assert served.ask(headers={"authorization": "Bearer sk-one"}).status_code == 200
        assert served.ask(headers={"authorization": "bearer sk-two"}).status_code == 200
        for wrong in ("Bearer sk-three", "Bearer", "Basic sk-one", "sk-one", "Bearer sk-onesk-two", "Bearer ÿ"):
            headers = {b"authorization": wrong.encode("latin-1")}
            response = httpx2.post(f"{served.url}/v1/chat/completions", json=BODY, headers=headers)
            assert response.status_code == 401, wrong
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert served.ask().json()["error"]["message"].startswith("an API key is needed")
        assert httpx2.get(f"{served.url}/v1/models").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="no").models.list()


def test_what_operators_probe_needs_no_key() -> None:
    with serving(1, settings=KEYED) as served:
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert httpx2.get(served.url + path).status_code == 200


def test_keys_are_masked_wherever_settings_are_shown() -> None:
    assert "sk-one" not in repr(KEYED) + str(KEYED) + KEYED.model_dump_json()


def test_more_requests_than_may_run_and_wait_are_refused_with_429() -> None:
    settings = ServerSettings(max_running=1, max_queued=1)
    with serving(1, settings=settings, ttft_s=0.5) as served, ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(lambda _: served.ask(), range(6)))
        codes = sorted(response.status_code for response in responses)
        assert codes == [200, 200, 429, 429, 429, 429]
        refused = next(response for response in responses if response.status_code == 429)
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1" and refused.headers["x-should-retry"] == "true"
        assert served.ask().status_code == 200


async def test_places_are_given_in_order_and_a_wait_is_bounded() -> None:
    admission = Admission(ServerSettings(max_running=1, max_queued=2, queue_timeout_s=0.05))
    async with admission.place():
        with pytest.raises(Overloaded, match=r"no place within 0\.05 s"):
            async with admission.place():
                pass
        assert (admission.running, admission.queued) == (1, 0)
    order: list[int] = []

    async def take(number: int) -> None:
        async with admission.place():
            order.append(number)

    async with admission.place():
        tasks = [asyncio.create_task(take(number)) for number in range(2)]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert order == [0, 1] and (admission.running, admission.queued) == (0, 0)


async def test_a_wait_that_is_given_up_leaves_its_place_to_others() -> None:
    admission = Admission(ServerSettings(max_running=1, max_queued=1))

    async def wait() -> None:
        async with admission.place():
            pass

    async with admission.place():
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert admission.queued == 0
    await asyncio.wait_for(wait(), 1)


async def test_callers_with_keys_of_their_own_take_turns_however_many_requests_one_of_them_has() -> None:
    admission = Admission(ServerSettings(max_running=1, max_queued=10))
    order: list[str] = []

    async def ask(caller: str) -> None:
        async with admission.place(caller):
            order.append(caller)
            await asyncio.sleep(0)

    async with admission.place("first"):
        waiting = [asyncio.create_task(ask(caller)) for caller in ("a", "a", "a", "a", "b", "b", "c")]
        await asyncio.sleep(0)
        assert admission.queued == 7
    await asyncio.gather(*waiting)
    assert order == ["a", "b", "c", "a", "b", "a", "a"]
    assert (admission.running, admission.queued) == (0, 0)


async def test_a_full_queue_refuses_the_last_of_whoever_has_most_in_it() -> None:
    admission = Admission(ServerSettings(max_running=1, max_queued=3))

    async def ask(caller: str) -> str:
        try:
            async with admission.place(caller):
                return "answered"
        except Overloaded:
            return "refused"

    async with admission.place("a"):
        greedy = [asyncio.create_task(ask("a")) for _ in range(4)]
        await asyncio.sleep(0)
        modest = [asyncio.create_task(ask("b")) for _ in range(2)]
        await asyncio.sleep(0)
        assert admission.queued == 3
    assert await asyncio.gather(*greedy) == ["answered", "answered", "refused", "refused"]
    assert await asyncio.gather(*modest) == ["answered", "refused"]
    assert (admission.running, admission.queued) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(("stays", "leaves", "late"))), max_size=25))
def test_no_place_is_lost_whoever_gives_up_and_when(requests: list[tuple[str, str]]) -> None:
    async def main() -> None:
        admission = Admission(ServerSettings(max_running=2, max_queued=6))

        async def ask(caller: str) -> None:
            with suppress(Overloaded):
                async with admission.place(caller):
                    await asyncio.sleep(0)

        tasks = []
        for caller, how in requests:
            task = asyncio.create_task(ask(caller))
            tasks.append(task)
            if how != "stays":
                for _ in range(how == "late"):
                    await asyncio.sleep(0)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (admission.running, admission.queued) == (0, 0)
        async with asyncio.timeout(5), admission.place("d"), admission.place("d"):
            pass

    asyncio.run(main())


def test_a_client_that_leaves_a_stream_stops_the_engines() -> None:
    with serving(1, itl_s=0.01, reply_tokens=100_000) as served:
        body = {**BODY, "model": "panel/chief", "stream": True}
        with httpx2.stream("POST", f"{served.url}/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        served.until_idle()


def test_pages_of_other_origins_may_call_only_where_the_deployer_says_so() -> None:
    ask = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with serving(1) as served:
        assert "access-control-allow-origin" not in httpx2.options(f"{served.url}/v1/models", headers=ask).headers
    with serving(1, settings=ServerSettings(cors_origins=("https://page.example",))) as served:
        allowed = httpx2.options(f"{served.url}/v1/models", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
