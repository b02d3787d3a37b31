"""Through the openai SDK, as most callers will."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from moa_ray.server import ServerSettings
from tests.server.local import Served, serving

WHY: list[ChatCompletionMessageParam] = [{"role": "user", "content": "why?"}]
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def test_a_whole_answer_has_text_usage_and_the_account_of_every_agent(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="panel", messages=WHY)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (
        "one two three four",
        "assistant",
        "stop",
    )
    assert answer.id.startswith("chatcmpl-") and answer.model == "panel" and answer.usage is not None
    rows = answer.model_extra["moa"]["agents"]  # type: ignore[index]
    assert [(row["agent"], row["state"]) for row in rows] == [(name, "finished") for name in ("a1", "a2", "chief")]
    assert answer.usage.completion_tokens == sum(row["completion_tokens"] for row in rows) == 3 + 3 + 4
    assert answer.usage.prompt_tokens == sum(row["prompt_tokens"] for row in rows)
    assert answer.usage.completion_tokens_details and answer.usage.completion_tokens_details.reasoning_tokens == 6


def test_a_stream_begins_with_the_role_and_ends_with_the_reason_and_the_account(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="panel", messages=WHY, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three four"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    accounts = [(chunk.model_extra or {}).get("moa") for chunk in chunks]
    assert accounts[:-1] == [None] * (len(chunks) - 1)
    assert len(accounts[-1]["agents"]) == 3  # type: ignore[index]
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_of_a_stream_comes_last_when_it_is_asked_for(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="panel", messages=WHY, stream=True, stream_options={"include_usage": True}
    )
    *_, finish, last = list(stream)
    assert finish.choices[0].finish_reason == "stop" and last.choices == []
    assert last.usage and last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert "moa" in (last.model_extra or {}) and "moa" not in (finish.model_extra or {})


def test_drafts_come_as_reasoning_only_when_they_are_asked_for(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model="panel", messages=WHY)
    assert "reasoning" not in (plain.choices[0].message.model_extra or {})
    extra = {"moa": {"drafts": True}}
    whole = client.chat.completions.create(model="panel", messages=WHY, extra_body=extra)
    told = whole.choices[0].message.model_extra or {}
    assert told["reasoning"] == told["reasoning_content"]
    assert "[1/a1]\na1 says why?" in told["reasoning"] and "[1/a2]\na2 says why?" in told["reasoning"]
    stream = client.chat.completions.create(model="panel", messages=WHY, stream=True, extra_body=extra)
    deltas = [chunk.choices[0].delta for chunk in stream]
    streamed = "".join((delta.model_extra or {}).get("reasoning", "") for delta in deltas)
    assert sorted(streamed.split("\n\n")) == sorted(told["reasoning"].split("\n\n"))
    kinds = ["reasoning" if delta.model_extra else "content" for delta in deltas if delta.content or delta.model_extra]
    assert kinds == sorted(kinds, reverse=True), "drafts come before the answer"


def test_a_deployer_may_send_drafts_to_everybody() -> None:
    with serving(2, settings=ServerSettings(drafts=True)) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
        assert "reasoning" in (
            client.chat.completions.create(model="panel", messages=WHY).choices[0].message.model_extra or {}
        )
        off = client.chat.completions.create(model="panel", messages=WHY, extra_body={"moa": {"drafts": False}})
        assert "reasoning" not in (off.choices[0].message.model_extra or {})


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_are_n_runs(client: openai.OpenAI, served: Served, stream: bool) -> None:
    if stream:
        texts = ["", ""]
        for chunk in client.chat.completions.create(model="panel", messages=WHY, n=2, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        answer = client.chat.completions.create(model="panel", messages=WHY, n=2)
        texts = [choice.message.content or "" for choice in answer.choices]
        assert {row["choice"] for row in answer.model_extra["moa"]["agents"]} == {0, 1}  # type: ignore[index]
    assert texts == ["one two three four"] * 2
    assert len(served.engine.calls) == 6


def test_sampling_reaches_the_aggregator(client: openai.OpenAI, served: Served) -> None:
    client.chat.completions.create(
        model="panel", messages=WHY, temperature=0.3, top_p=0.5, max_completion_tokens=2, stop="END", seed=7
    )
    chief = next(call for call in served.engine.calls if call.agent == "chief").sampling
    assert (chief.temperature, chief.top_p, chief.max_tokens, chief.stop) == (0.3, 0.5, 2, ("END",))
    assert chief.seed is not None


def test_an_answer_that_was_cut_says_so(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="panel", messages=WHY, max_tokens=2)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one two ", "length")


def test_an_agent_can_be_asked_alone(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.create(model="panel/a2", messages=WHY)
    assert answer.choices[0].message.content == "a2 says why?"
    assert [call.agent for call in served.engine.calls] == ["a2"]


def test_messages_in_parts_and_of_developers_are_understood(client: openai.OpenAI, served: Served) -> None:
    client.chat.completions.create(
        model="panel",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "why "}, {"type": "text", "text": "not?"}]},
        ],
    )
    first = next(call for call in served.engine.calls if call.agent == "a1")
    assert first.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "why not?"})


def test_k_and_policy_of_a_request_are_honoured_within_the_limits(client: openai.OpenAI, served: Served) -> None:
    client.chat.completions.create(model="panel", messages=WHY, extra_body={"moa": {"k": 1}})
    assert [call.agent for call in served.engine.calls] == ["a1", "chief"]
    with pytest.raises(openai.BadRequestError, match=r"policy\.retries: 9 is more than the 1 allowed here"):
        client.chat.completions.create(model="panel", messages=WHY, extra_body={"moa": {"policy": {"retries": 9}}})


@pytest.mark.parametrize("stream", [False, True])
def test_tools_and_response_format_go_to_the_aggregator_and_its_calls_come_back(stream: bool) -> None:
    with serving(2, tool_call={"name": "look_up", "arguments": {"x": 1}}) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
        given: Any = {
            "model": "panel",
            "messages": WHY,
            "tools": [TOOL],
            "response_format": {"type": "json_object"},
        }
        if stream:
            with client.chat.completions.stream(**given) as events:
                choice: Any = events.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(**given).choices[0]
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        (call,) = choice.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("look_up", '{"x": 1}')
        assert [(c.agent, set(c.extra)) for c in served.engine.calls if c.extra] == [
            ("chief", {"tools", "response_format"})
        ]


async def test_the_asynchronous_client_is_served_too(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(model="panel", messages=WHY, stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == "one two three four"


def test_a_failure_before_the_first_token_has_its_own_status() -> None:
    with serving(2, faults=[{"kind": "refused"}]) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="0 of 2 agents answered") as caught:
            client.chat.completions.create(model="panel", messages=WHY, stream=True)
        assert caught.value.status_code == 503 and caught.value.code == "quorum_not_met"
        assert caught.value.response.headers["retry-after"] == "1"


def test_a_failure_in_mid_stream_is_an_error_event_and_no_end() -> None:
    faults = [{"agent": "chief", "after_tokens": 2}]
    with serving(2, replies={"chief": "one two three"}, itl_s=0.05, faults=faults, continues=False) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(model="panel", messages=WHY, stream=True)
        text = ""
        with pytest.raises(openai.APIError, match="scripted fault"):
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                assert chunk.choices[0].finish_reason is None
        assert text == "one two "
        raw = _raw(served)
        assert '"error"' in raw.text and "[DONE]" not in raw.text


def test_silence_is_filled_with_comments_and_then_failures_come_as_events() -> None:
    settings = ServerSettings(silence_s=0.05)
    with serving(2, settings=settings, ttft_s=0.3) as served:
        text = _raw(served).text
        assert ": keep-alive" in text and text.rstrip().endswith("data: [DONE]")
    with serving(2, settings=settings, ttft_s=0.3, faults=[{"kind": "refused", "agent": "chief"}]) as served:
        raw = _raw(served)
        assert raw.status_code == 200 and ": keep-alive" in raw.text
        assert '"code":"engine_refused"' in raw.text and "[DONE]" not in raw.text


def _raw(served: Served) -> httpx2.Response:
    body = {"model": "panel", "messages": WHY, "stream": True}
    return httpx2.post(f"{served.url}/v1/chat/completions", json=body)


async def test_the_more_streams_there_are_the_fewer_pieces_a_second_each_of_them_gets() -> None:
    with serving(1, reply_tokens=8, ttft_s=0.3) as served:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def ask() -> str:
                stream = await client.chat.completions.create(model="panel", messages=WHY, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            texts = [await ask(), *await asyncio.gather(*(ask() for _ in range(60)))]
        paces = [call.flush_s for call in served.engine.calls if call.agent == "chief"]
    assert set(texts) == {"1 2 3 4 5 6 7 8 "}
    assert paces[0] == 0.02 and 0.02 < max(paces) <= 0.12
