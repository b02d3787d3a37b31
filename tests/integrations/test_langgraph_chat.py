"""A graph as LangChain's chat model, against a server of scripted engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moa_ray.client import Client
from moa_ray.errors import ModelNotFound, RequestError, Unauthorized
from moa_ray.server import ServerSettings
from tests.server.local import Served, serving

pytest.importorskip("langchain_core")

from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from moa_ray.integrations.langchain import ChatMoA

LOOK_UP = {"name": "look_up", "arguments": {"word": "why"}}


@tool  # type: ignore[untyped-decorator]
def look_up(word: str) -> str:
    """Look a word up."""
    return f"{word} is a word"


def _model(served: Served, **settings: Any) -> Any:
    return ChatMoA(server=f"{served.url}/v1", **{"model": "panel", **settings})


def _joined(pieces: list[AIMessageChunk]) -> AIMessageChunk:
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    return whole


async def _invoke(model: Any, question: Any, **asked: Any) -> Any:
    return model.invoke(question, **asked)


async def _ainvoke(model: Any, question: Any, **asked: Any) -> Any:
    return await model.ainvoke(question, **asked)


async def _stream(model: Any, question: Any, **asked: Any) -> Any:
    return _joined(list(model.stream(question, **asked)))


async def _astream(model: Any, question: Any, **asked: Any) -> Any:
    return _joined([piece async for piece in model.astream(question, **asked)])


each_way = pytest.mark.parametrize("way", [_invoke, _ainvoke, _stream, _astream])
Way = Callable[..., Any]


@each_way
async def test_it_answers_as_the_client_does_with_usage_and_the_account_of_the_agents(way: Way) -> None:
    with serving(2) as served, Client(f"{served.url}/v1") as client:
        answer = await way(_model(served), "why?")
        expected = client.run("why?")
    assert answer.text == expected.text
    usage = answer.usage_metadata
    assert usage["output_tokens"] == expected.usage.completion_tokens
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    assert usage["output_token_details"]["reasoning"] == expected.usage.reasoning_tokens > 0
    told = answer.response_metadata
    assert (told["finish_reason"], told["model_name"]) == ("stop", "panel") and told["id"].startswith("chatcmpl-")
    assert sorted(agent["call"] for agent in told["agents"]) == ["1/a1", "1/a2", "answer"]


@each_way
async def test_drafts_come_as_reasoning(way: Way) -> None:
    with serving(2, replies={"a1": "One.", "a2": "Two.", "chief": "Both."}) as served:
        answer = await way(_model(served), "why?", drafts=True)
    reasoning = answer.additional_kwargs["reasoning_content"]
    assert "One." in reasoning and "Two." in reasoning and answer.text == "Both."


async def test_text_comes_as_it_is_said() -> None:
    with serving(1, reply_tokens=8, itl_s=0.05) as served:
        assert len([piece for piece in _model(served).stream("why?") if piece.text]) > 1
        assert len([piece async for piece in _model(served).astream("why?") if piece.text]) > 1


@each_way
async def test_tools_reach_the_aggregator_and_its_calls_come_back(way: Way) -> None:
    with serving(2, tool_call=LOOK_UP) as served:
        model = _model(served).bind_tools([look_up], tool_choice="any")
        asking = await way(model, "why?")
        (call,) = asking.tool_calls
        assert (call["name"], call["args"], asking.response_metadata["finish_reason"]) == (
            "look_up",
            {"word": "why"},
            "tool_calls",
        )
        sent = [each.extra for each in served.engine.calls if each.agent == "chief"][-1]
        assert sent["tools"][0]["function"]["name"] == "look_up" and sent["tool_choice"] == "required"
        answer = await way(model, [HumanMessage("why?"), asking, look_up.invoke(call)])
    assert answer.text.startswith("chief answers") and not answer.tool_calls


def test_one_of_the_tools_may_be_demanded_by_name() -> None:
    with serving(1, tool_call=LOOK_UP) as served:
        _model(served).bind_tools([look_up], tool_choice="look_up").invoke("why?")
        sent = [each.extra for each in served.engine.calls if each.agent == "chief"][-1]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "look_up"}}


def test_structured_output_comes_by_way_of_a_tool() -> None:
    class Entry(BaseModel):
        """An entry of a dictionary."""

        word: str

    with serving(1, tool_call={"name": "Entry", "arguments": {"word": "why"}}) as served:
        assert _model(served).with_structured_output(Entry).invoke("why?") == Entry(word="why")


def test_a_conversation_reaches_the_agents_whole() -> None:
    conversation = [
        SystemMessage("Be kind."),
        HumanMessage("why?"),
        AIMessage("", tool_calls=[{"name": "look_up", "args": {"word": "why"}, "id": "1"}]),
        ToolMessage("a word", tool_call_id="1"),
    ]
    with serving(1) as served:
        _model(served).invoke(conversation, k=1, temperature=0.25, stop=["."])
        chief = next(call for call in served.engine.calls if call.agent == "chief")
    roles = [message["role"] for message in chief.messages]
    assert roles[:3] == ["system", "user", "assistant"] and "tool" in roles
    assert (chief.sampling.temperature, tuple(chief.sampling.stop or ())) == (0.25, (".",))


def test_errors_are_moa_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(1) as served:
        with pytest.raises(ModelNotFound):
            _model(served, model="pannel").invoke("why?")
        with pytest.raises(RequestError, match="unknown option: temprature"):
            _model(served).invoke("why?", temprature=1)
    with serving(1, settings=ServerSettings(api_keys=("secret",))) as served:
        monkeypatch.delenv("MOA_RAY_API_KEY", raising=False)
        with pytest.raises(Unauthorized):
            _model(served).invoke("why?")
        monkeypatch.setenv("MOA_RAY_API_KEY", "secret")
        assert _model(served).invoke("why?").text
        assert "secret" not in repr(_model(served))
